"""Calibration text on the command line: its options, and the tokens that they name."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from torch import Tensor

from qat.ptq.making import calibration_ids
from tmexport.cli.options import PATH, threads_option, tokenizer_option

TEXT_OPTIONS = (
    click.option(
        "--data", multiple=True, type=PATH, help="Calibration text, never the text to evaluate on; repeatable."
    ),
    click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Sequences of it."),
    click.option("--seq-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens of each."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Picks the sequences."),
    tokenizer_option,
    threads_option,
)


def read_ids(
    teacher: Path, data: Sequence[Path], tokenizer: Path | None, samples: int, seq_len: int, seed: int
) -> Tensor:
    """Calibration tokens int64 [samples, seq_len]."""
    with tempfile.TemporaryDirectory() as cache:
        return calibration_ids(teacher, list(data), tokenizer, samples, seq_len, seed, Path(cache))
