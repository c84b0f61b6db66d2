"""Fuzz the gguf reader: header, tensors, metadata and every block decoded.

Usage: python scripts/faults/fuzz_gguf.py --seconds 600 [--keep FOLDER]      (rules and engine: scripts/faults/fuzz_common.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.faults.fuzz_common import Options, Target, fuzz, fuzz_command
from tmexport.cli.app import run_command


def load(scratch: Path) -> Target:
    from tests.hostile import seeds, targets

    path = scratch / "m.gguf"

    def accepts(data: bytes) -> bool:
        path.write_bytes(data)
        return targets.accepts_gguf(path)

    return Target(seeds.gguf_seeds(), seeds.gguf_words(), accepts)


@fuzz_command
def main(**options: Any) -> None:
    """Fuzz the gguf reader; rules and engine: scripts/faults/fuzz_common.py."""
    fuzz("gguf", load, Options(**options))


if __name__ == "__main__":
    run_command(main, "scripts/faults/fuzz_gguf.py")
