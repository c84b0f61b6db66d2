"""Make a low-bit checkpoint without training.

python -m qat.ptq gptq --teacher out/teacher --data text.jsonl --out out/gptq
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from qat.ptq.making import METHODS, Method, make
from qat.ptq.recipes import recipe
from qat.ptq.text import TEXT_OPTIONS, read_ids
from qat.ptq.transforms import TRANSFORMS
from tmexport.cli.options import HELP, PATH, json_option
from tmexport.threads import default_threads
from tmexport.types import KINDS


@click.group(context_settings=HELP)
def main() -> None:
    """Make a low-bit checkpoint without training."""


_WHICH = "Which become that kind: all, mixers (not the MLPs'), or roles: in_proj,down_proj."


_STEPS = "; ".join(f"{name}: {transform.help}" for name, transform in TRANSFORMS.items())


def _options() -> list[Callable[..., Any]]:
    return [
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
        click.option(
            "--transform",
            "transforms",
            multiple=True,
            type=click.Choice(list(TRANSFORMS)),
            help=f"Before rounding, in the order given; repeatable. {_STEPS}.",
        ),
        json_option,
        *TEXT_OPTIONS,
    ]


def _command(name: str, method: Method) -> click.Command:
    def run(
        teacher: Path, out: Path, weights: str, embedding: str, group_size: int | None, projections: str, rest: str,
        transforms: tuple[str, ...], as_json: bool, data: tuple[Path, ...], samples: int, seq_len: int, seed: int,
        tokenizer: Path | None, threads: int | None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(threads or default_threads())
        if method.reads_text and not data:
            raise click.UsageError(f"{name} reads calibration text; add --data")
        ids = read_ids(teacher, data, tokenizer, samples, seq_len, seed) if data else None
        made = make(name, teacher, out, weights, group_size, ids, embedding, projections, rest, transforms, seed)
        if as_json:
            said = {"out": str(out), "method": name, "weights": weights, "zero_ratio": made.zero_ratio}
            click.echo(json.dumps(said | {"transforms": made.transforms}))
        else:
            steps = "".join(f"{transform}, " for transform in transforms)
            click.echo(f"{out}: {steps}{weights} by {name}, {made.zero_ratio:.1%} zeros")

    run.__doc__ = f"""{method.help}

    \b
    Example:
      tmexport ptq {name} --teacher out/teacher {"--data text.jsonl " if method.reads_text else ""}--out out/{name}
    """
    for option in reversed(_options()):
        run = option(run)
    return click.command(name)(run)


for _name, _method in METHODS.items():
    main.add_command(_command(_name, _method))
main.add_command(recipe)
