"""Fuzz the checkpoint reader: config.json, safetensors, shard index, torch archive and the pickle in it.

Usage: python scripts/faults/fuzz_checkpoint.py --seconds 600 [--keep FOLDER]      (rules and engine: scripts/faults/fuzz_common.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.faults.fuzz_common import Options, Target, fuzz, fuzz_command
from tmexport.cli.app import run_command


def load(scratch: Path) -> Target:
    from tests.hostile import seeds, targets

    folder = scratch / "checkpoint"
    folder.mkdir()
    return Target(
        seeds.checkpoint_seeds(), seeds.checkpoint_words(), lambda data: targets.accepts_checkpoint(folder, data)
    )


@fuzz_command
def main(**options: Any) -> None:
    """Fuzz the checkpoint reader; rules and engine: scripts/faults/fuzz_common.py."""
    fuzz("checkpoint", load, Options(**options))


if __name__ == "__main__":
    run_command(main, "scripts/faults/fuzz_checkpoint.py")
