"""`tmexport convert`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from qat.convert.making import convert
from qat.convert.shape import describe
from qat.ptq.text import TEXT_OPTIONS, read_ids
from qat.train.teacher import teacher_folder
from tmexport.cli.options import HELP, PATH, json_option
from tmexport.threads import default_threads


@click.command("convert", context_settings=HELP)
@click.option("--transformer", required=True, type=PATH, help="A llama: checkpoint folder or GGUF.")
@click.option("--out", required=True, type=PATH, help="Folder to write.")
@click.option(
    "--keep",
    default="auto",
    show_default=True,
    help="Layers that keep their attention: auto, a quarter, those whose replacement costs most; auto:N; N, evenly spaced; or "
    "numbers from 0 with commas.",
)
@json_option
def main(
    transformer: Path, out: Path, keep: str, as_json: bool, data: tuple[Path, ...], samples: int, seq_len: int, seed: int,
    tokenizer: Path | None, threads: int | None,
) -> None:  # fmt: skip
    """Make a hybrid out of a Transformer: Mamba-2 started from its attention, fitted on text without a gradient.

    The result is what `tmexport train` aligns and distils; llama.cpp loads its GGUF as a granitehybrid.

    \b
    Example:
      tmexport convert --transformer smollm2/ --data text.jsonl --out hybrid
    """
    torch.set_num_threads(threads or default_threads())
    if not data:
        raise click.UsageError("convert reads calibration text; add --data")
    with TemporaryDirectory() as cache:
        folder = teacher_folder(transformer, Path(cache))
        ids = read_ids(folder, data, tokenizer, samples, seq_len, seed)
        made = convert(folder, keep, out, ids)
    if as_json:
        said = {"out": str(out), **made.cost.as_dict(), "error": made.error, "errors": made.errors}
        click.echo(json.dumps(said | ({"costs": made.ranks} if made.ranks else {})))
        return
    for layer, cost in sorted(made.ranks.items(), key=lambda pair: -pair[1]):
        click.echo(f"layer {layer:<3}    replaced alone costs {cost:.4f} nats a token")
    click.echo(describe(made.cost))
    click.echo(f"{out}: {made.error:.1%} of what the replaced layers add is missed on the calibration text")


for _option in reversed(TEXT_OPTIONS):
    main = _option(main)
