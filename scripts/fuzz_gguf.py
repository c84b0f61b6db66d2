"""Fuzz the gguf reader: header, tensors, metadata and every block decoded.

Usage: python scripts/fuzz_gguf.py --seconds 600 [--keep FOLDER]      (rules and engine: scripts/fuzz_common.py)
"""

from __future__ import annotations

from pathlib import Path

from fuzz_common import Target, main


def load(scratch: Path) -> Target:
    from tests.hostile import seeds, targets

    path = scratch / "m.gguf"

    def accepts(data: bytes) -> bool:
        path.write_bytes(data)
        return targets.accepts_gguf(path)

    return Target(seeds.gguf_seeds(), seeds.gguf_words(), accepts)


if __name__ == "__main__":
    main("gguf", load)
