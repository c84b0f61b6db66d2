"""`tmexport verify`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tmexport.cli.options import HELP, PATH, json_option
from tmexport.cli.progress import progress_bar
from tmexport.errors import TmexportError
from tmexport.extras import import_with


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=PATH)
@click.argument("exported", type=PATH)
@json_option
def verify(checkpoint: Path, exported: Path, as_json: bool) -> None:
    """Prove that EXPORTED holds CHECKPOINT: codes and scales bit for bit, the rest within its type's rounding.

    Exits with 0, or with 1 and the first difference named.

    \b
    Example:
      tmexport verify ckpt/ model.gguf
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.reader import open_gguf
    from tmexport.verify import verify_gguf

    source = open_checkpoint(checkpoint)
    with progress_bar("comparing", len(source.names), unit="tensors") as bar:
        if exported.suffix == ".onnx":
            verify_onnx = import_with("onnx", "tmexport.onnx.verify").verify_onnx
            report = verify_onnx(source, exported, lambda name: bar.advance())
        else:
            report = verify_gguf(source, open_gguf(exported), lambda name: bar.advance())
    if as_json:
        difference = vars(report.difference) if report.difference else None
        click.echo(json.dumps(vars(report) | {"equal": difference is None, "difference": difference}))
    elif report.difference is None:
        click.echo(
            f"{click.format_filename(exported)}: equal. {report.codes:,} codes and {report.scales:,} scales in {report.ternary_tensors} ternary tensors "
            f"bit for bit; {report.other_tensors} other tensors within their type's rounding"
        )
    if report.difference is not None:
        raise TmexportError(f"{exported}: {report.difference}")
