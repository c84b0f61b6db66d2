"""Fuzz the checkpoint reader: config.json, safetensors, shard index, torch archive and the pickle in it.

Usage: python scripts/fuzz_checkpoint.py --seconds 600 [--keep FOLDER]      (rules and engine: scripts/fuzz_common.py)
"""

from __future__ import annotations

from pathlib import Path

from fuzz_common import Target, main


def load(scratch: Path) -> Target:
    from tests.hostile import seeds, targets

    folder = scratch / "checkpoint"
    folder.mkdir()
    return Target(
        seeds.checkpoint_seeds(), seeds.checkpoint_words(), lambda data: targets.accepts_checkpoint(folder, data)
    )


if __name__ == "__main__":
    main("checkpoint", load)
