"""Make a low-bit checkpoint without training.

python -m qat.ptq gptq --teacher out/teacher --data text.jsonl --out out/gptq
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from qat.ptq.making import METHODS, Method, calibration_ids, make
from tmexport.cli.options import HELP, PATH, json_option, threads_option, tokenizer_option
from tmexport.threads import default_threads
from tmexport.types import KINDS


@click.group(context_settings=HELP)
def main() -> None:
    """Make a low-bit checkpoint without training."""


_WHICH = "Which become that kind: all, mixers (not the MLPs'), or roles: in_proj,down_proj."


def _options(name: str, method: Method) -> list[Callable[..., Any]]:
    options = [
        click.option("--teacher", required=True, type=PATH, help="Checkpoint folder of the full-precision model."),
        click.option("--out", required=True, type=PATH, help="Folder to write."),
        click.option(
            "--weights", type=click.Choice(list(KINDS)), default="ternary", show_default=True, help="Their kind."
        ),
        click.option(
            "--embedding",
            type=click.Choice(["dense", *KINDS]),
            default="dense",
            show_default=True,
            help="Kind of the embedding and of an untied head, rounded to nearest.",
        ),
        click.option("--group-size", type=int, help="Weights that share a scale. Default: the widest that fits."),
        click.option("--projections", default="all", show_default=True, help=_WHICH),
        click.option(
            "--rest",
            type=click.Choice(["dense", *KINDS]),
            default="dense",
            show_default=True,
            help="Kind of the other projections, rounded to nearest.",
        ),
        json_option,
    ]
    if method.reads_text:
        options += [
            click.option("--data", multiple=True, required=True, type=PATH, help="Calibration text; repeatable."),
            click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="Sequences of it."),
            click.option("--seq-len", type=click.IntRange(1), default=512, show_default=True, help="Tokens of each."),
            click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Picks the sequences."),
            tokenizer_option,
            threads_option,
        ]
    return options


def _command(name: str, method: Method) -> click.Command:
    def run(
        teacher: Path, out: Path, weights: str, embedding: str, group_size: int | None, projections: str, rest: str,
        as_json: bool, data: tuple[Path, ...] = (), samples: int = 0, seq_len: int = 0, seed: int = 0, tokenizer: Path | None = None, threads: int | None = None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads or default_threads())
        ids = None
        if method.reads_text:
            with tempfile.TemporaryDirectory() as cache:
                ids = calibration_ids(teacher, list(data), tokenizer, samples, seq_len, seed, Path(cache))
        zero_ratio = make(name, teacher, out, weights, group_size, ids, embedding, projections, rest)
        if as_json:
            click.echo(json.dumps({"out": str(out), "method": name, "weights": weights, "zero_ratio": zero_ratio}))
        else:
            click.echo(f"{out}: {weights} by {name}, {zero_ratio:.1%} zeros")

    run.__doc__ = f"""{method.help}

    \b
    Example:
      tmexport ptq {name} --teacher out/teacher {"--data text.jsonl " if method.reads_text else ""}--out out/{name}
    """
    for option in reversed(_options(name, method)):
        run = option(run)
    return click.command(name)(run)


for _name, _method in METHODS.items():
    main.add_command(_command(_name, _method))
