"""Fuzz the tokenizer reader: a tokenizer.json exported, loaded and used.

Usage: python scripts/faults/fuzz_tokenizer.py --seconds 600 [--keep FOLDER]      (rules and engine: scripts/faults/fuzz_common.py)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.faults.fuzz_common import Options, Target, fuzz, fuzz_command
from tmexport.cli.app import run_command


def load(scratch: Path) -> Target:
    from tests.hostile import seeds, targets

    path = scratch / "tokenizer.json"
    return Target(seeds.tokenizer_seeds(), seeds.tokenizer_words(), lambda data: targets.accepts_tokenizer(path, data))


@fuzz_command
def main(**options: Any) -> None:
    """Fuzz the tokenizer reader; rules and engine: scripts/faults/fuzz_common.py."""
    fuzz("tokenizer", load, Options(**options))


if __name__ == "__main__":
    run_command(main, "scripts/faults/fuzz_tokenizer.py")
