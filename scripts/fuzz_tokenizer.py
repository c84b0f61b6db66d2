"""Fuzz the tokenizer reader: a tokenizer.json exported, loaded and used.

Usage: python scripts/fuzz_tokenizer.py --seconds 600 [--keep FOLDER]      (rules and engine: scripts/fuzz_common.py)
"""

from __future__ import annotations

from pathlib import Path

from fuzz_common import Target, main


def load(scratch: Path) -> Target:
    from tests.hostile import seeds, targets

    path = scratch / "tokenizer.json"
    return Target(seeds.tokenizer_seeds(), seeds.tokenizer_words(), lambda data: targets.accepts_tokenizer(path, data))


if __name__ == "__main__":
    main("tokenizer", load)
