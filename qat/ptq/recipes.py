"""Published methods by name: transformations, a way of rounding and the bits, in one command.

What is theirs and what is ours: the transformations and their order; weights in blocks of 32 with an fp16 scale (theirs: 128
or a tensor), so that Q4_0 and Q8_0 hold them; activations rounded at run time in blocks of 32 (theirs: with static scales),
by `--profile fast` (8 bits) or `exact` (16). A rotation before out_proj, which both have, needs an operation that stock
programs do not, and is left out: it is the transformation `online`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from qat.model import load_model
from qat.ptq.making import make
from qat.ptq.statistics import gather, save
from qat.ptq.text import TEXT_OPTIONS, read_ids
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.options import HELP, PATH, json_option
from tmexport.threads import default_threads


@dataclass(frozen=True)
class Recipe:
    """transforms: keys of TRANSFORMS; method: a key of METHODS; did: a line that says what it does."""

    transforms: tuple[str, ...]
    method: str
    did: str


RECIPES = {
    "quamba2": Recipe(
        ("fold", "sort", "hadamard"), "gptq",
        "norms folded, heads and channels sorted, residual stream turned by a Hadamard matrix, GPTQ",
    ),
    "mambaquant": Recipe(
        ("klt", "smooth"), "rtn",
        "residual stream turned by its principal axes times a Hadamard matrix, out_proj's inputs smoothed, rounded to nearest",
    ),
    "gptq": Recipe((), "gptq", "GPTQ"),
}  # fmt: skip
BITS = {
    "w8a8": ("int8", "fast"),
    "w4a8": ("int4", "fast"),
    "w4a16": ("int4", "exact"),
}  # kind of weights, profile to run


@click.command(context_settings=HELP)
@click.argument("name", type=click.Choice(list(RECIPES)))
@click.option(
    "--bits", type=click.Choice(list(BITS)), default="w4a8", show_default=True, help="Of weights, activations."
)
@click.option("--teacher", required=True, type=PATH, help="Checkpoint folder of the full-precision model.")
@click.option("--out", required=True, type=PATH, help="Folder to write; statistics.json in it says what was measured.")
@json_option
def recipe(
    name: str, bits: str, teacher: Path, out: Path, as_json: bool, data: tuple[Path, ...], samples: int, seq_len: int,
    seed: int, tokenizer: Path | None, threads: int | None,
) -> None:  # fmt: skip
    """A published method of quantising state-space models, by NAME; the embedding and the head become int8.

    \b
    Example:
      tmexport ptq recipe quamba2 --bits w4a8 --teacher out/teacher --data text.jsonl --out out/w4a8
    """
    torch.set_num_threads(threads or default_threads())
    if not data:
        raise click.UsageError(f"recipe {name} reads calibration text; add --data")
    chosen, (kind, profile) = RECIPES[name], BITS[bits]
    ids = read_ids(teacher, data, tokenizer, samples, seq_len, seed)
    start = time.monotonic()
    made = make(chosen.method, teacher, out, kind, None, ids, "int8", transforms=chosen.transforms, seed=seed)
    save(gather(load_model(out), ids, moments=False), ids, out / "statistics.json")
    seconds = time.monotonic() - start
    size = sum(tensor.n_bytes for tensor in open_checkpoint(out).stored.values())
    if as_json:
        said = {"out": str(out), "recipe": name, "bits": bits, "profile": profile, "bytes": size, "seconds": seconds}
        click.echo(json.dumps(said | {"transforms": made.transforms}))
    else:
        click.echo(f"{out}: {chosen.did}; {size / 1e6:.1f} MB, {seconds:.0f} s; run it with --profile {profile}")


for _option in reversed(TEXT_OPTIONS):
    recipe = _option(recipe)
