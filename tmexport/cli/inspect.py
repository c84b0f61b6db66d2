"""`tmexport inspect`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmexport.cli.options import EMBEDDINGS, HELP, PATH, json_option
from tmexport.cli.progress import progress_bar

if TYPE_CHECKING:
    from tmexport.inspect import Summary

_WORDS = {stored: word for word, stored in EMBEDDINGS.items()}


@click.command(context_settings=HELP)
@click.argument("path", type=PATH)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what PATH (a GGUF file, an .onnx file or a checkpoint folder) holds: dimensions, types, sizes, zero ratios.

    \b
    Example:
      tmexport inspect model.gguf
    """
    from tmexport.inspect import inspect_path

    with progress_bar("reading", None, unit="tensors") as bar:
        summary = inspect_path(path, lambda name, total: bar.advance_of(total))
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
    else:
        _show(path, summary)


def _show(path: Path, summary: Summary) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    config, totals = summary.config, summary.as_dict()
    console = Console()
    console.print(
        f"[bold]{escape(click.format_filename(path))}[/]: {summary.format}, {summary.parameters:,} parameters, {summary.bytes / 1e6:.2f} MB",
        soft_wrap=True,
    )
    head = f"vocabulary {config.vocab_size}, head {'tied' if config.tie_embeddings else 'untied'}"
    console.print(f"blocks {config.n_layer}, d_model {config.d_model}, {head}", soft_wrap=True)
    counted = Counter(branch for block in config.blocks for branch in block.branches)
    for branch, count in counted.items():
        dimensions = ", ".join(f"{name} {value}" for name, value in branch.dimensions().items())
        console.print(f"{count} x {branch.kind}: {dimensions}", soft_wrap=True)
    if summary.onnx is not None:
        versions = ", ".join(f"{domain} {version}" for domain, version in summary.onnx["opset"].items())
        functions = ", ".join(summary.onnx["functions"]) or "none"
        console.print(
            f"form {summary.onnx['form']}, embedding {_WORDS[summary.onnx['embedding_type']]}, logits {summary.onnx['logits']}, operators of {versions}, "
            f"IR version {summary.onnx['ir_version']}, {summary.onnx['nodes']} nodes, functions: {functions}",
            soft_wrap=True,
        )
    if totals["zero_ratio"] is not None:
        console.print(
            f"ternary: group size {summary.group_size or 'none (not every projection)'}, zero ratio {totals['zero_ratio']:.4f}"
        )
    table = Table("tensor", "shape", "type", "bytes", "zero ratio", box=None, header_style="bold")
    for column in (3, 4):
        table.columns[column].justify = "right"
    for tensor in summary.tensors:
        ratio = "" if tensor.zero_ratio is None else f"{tensor.zero_ratio:.4f}"
        table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.type, f"{tensor.bytes:,}", ratio)
    console.print(table)
