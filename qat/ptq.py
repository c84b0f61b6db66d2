"""Ternary without training: the baselines that QAT is measured against.

python -m qat.ptq rtn --teacher out/teacher --out out/rtn
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("ptq", "python -m qat.ptq")

import json
from pathlib import Path

import click
import numpy as np

from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli.progress import progress_bar
from tmexport.errors import UsageError
from tmexport.types.ternary import GROUP_SIZES, TernaryTensor, quantize_absmean


def round_to_nearest(folder: Path, out: Path, group_size: int = 256) -> float:
    """Write the checkpoint `folder` to `out` with every projection rounded to ternary; returns the zero ratio.

    scale = mean|w| of the group, code = round(clip(w / scale, -1, 1)): no data, no training.
    """
    if out.resolve() == folder.resolve():
        raise UsageError(f"{out}: is the teacher's folder, which would be overwritten; choose another --out")
    checkpoint = open_checkpoint(folder)
    if (
        group_size not in GROUP_SIZES
        or checkpoint.config.d_model % group_size
        or checkpoint.config.d_inner % group_size
    ):
        raise UsageError(
            f"group size {group_size} does not fit rows of {checkpoint.config.d_model} and {checkpoint.config.d_inner}; "
            "expected 64, 128 or 256, and a divisor of both"
        )
    projections = set(checkpoint.config.projections)
    tensors: dict[str, np.ndarray | TernaryTensor] = {}
    zeros = total = 0
    with progress_bar("rounding", len(checkpoint.names), unit="tensors") as bar:
        for name in checkpoint.names:
            tensors[name] = checkpoint.dense(name)
            if name in projections:
                ternary = tensors[name] = quantize_absmean(checkpoint.dense(name), group_size)
                zeros, total = zeros + int((ternary.codes == 0).sum()), total + ternary.codes.size
            bar.advance(1)
    write_checkpoint(out, checkpoint.config, tensors, checkpoint.tokenizer)
    return zeros / total


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make a ternary checkpoint without training."""


@main.command()
@click.option("--teacher", required=True, type=click.Path(path_type=Path), help="Checkpoint folder.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--group-size", type=int, default=256, show_default=True, help="Weights that share a scale: 64, 128 or 256."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rtn(teacher: Path, out: Path, group_size: int, as_json: bool) -> None:
    """Round to nearest.

    \b
    Example:
      tmexport ptq rtn --teacher out/teacher --out out/rtn
    """
    zero_ratio = round_to_nearest(teacher, out, group_size)
    if as_json:
        click.echo(json.dumps({"out": str(out), "zero_ratio": zero_ratio}))
    else:
        click.echo(f"{out}: ternary by rounding, {zero_ratio:.1%} zeros")
