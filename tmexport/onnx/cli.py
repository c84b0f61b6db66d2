"""The commands `tmexport onnx` and `tmexport web`; onnx itself is imported when one of them runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmexport.errors import UsageError

if TYPE_CHECKING:
    from tmexport.checkpoint import Checkpoint
    from tmexport.inspect import Summary
    from tmexport.verify import Report

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("checkpoint", type=_PATH)
@click.argument("output", type=_PATH)
@click.option("--ops", "form", type=click.Choice(["ort", "portable", "custom"]), default="ort", show_default=True,
              help="ort: onnxruntime's 2-bit kernels. portable: standard operators only. custom: ours, as functions.")  # fmt: skip
@click.option("--embedding-type", type=click.Choice(["q8", "f16", "f32"]), default="q8", show_default=True,
              help="Of the embedding and of an untied head.")  # fmt: skip
@click.option("--opset", type=int, help="Version of ai.onnx. Default: the oldest that works (15; 23 for ort).")
@click.option("--io-names", type=click.Choice(["tmexport", "genai"]), default="tmexport", show_default=True,
              help="past_ssm.0 ..., or those of onnxruntime-genai's model builder.")  # fmt: skip
@click.option("--logits", type=click.Choice(["all", "last"]), default="all", show_default=True,
              help="Of every position, or of the last one only (a faster prefill).")  # fmt: skip
@click.option("--tokenizer", type=_PATH, help="A tokenizer.json, if the checkpoint has none of its own.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def onnx(
    checkpoint: Path,
    output: Path,
    form: str,
    embedding_type: str,
    opset: int | None,
    io_names: str,
    logits: str,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Export CHECKPOINT (a ternary one, or a dense one whose projections are exactly ternary) to OUTPUT, an ONNX file.

    OUTPUT's config and tokenizer are written beside it (model.config.json, model.tokenizer.json).

    \b
    Examples:
      tmexport onnx ckpt/ model.onnx
      tmexport onnx ckpt/ model.onnx --ops portable --embedding-type f16
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.cli import _progress

    _need_onnx()
    from tmexport.onnx.export import export_onnx
    from tmexport.onnx.graph import build_graph

    source = open_checkpoint(checkpoint)
    if output.exists() and any(output.samefile(file) for file in checkpoint.iterdir() if file.is_file()):
        raise UsageError(f"{output}: is a file of the checkpoint itself; name another file to write")
    graph = build_graph(source, form, embedding_type, opset, io_names, logits)
    if tokenizer is None and source.tokenizer is None:
        click.echo("warning: no tokenizer.json in the checkpoint; none is written beside the file (see --tokenizer)", err=True)  # fmt: skip
    with _progress() as progress:
        task = progress.add_task("writing", total=len(graph.initializers))
        result = export_onnx(output, graph, tokenizer or source.tokenizer, lambda tensor: progress.advance(task))
    if as_json:
        opsets = {o.domain or "ai.onnx": o.version for o in graph.skeleton.opset_import}
        click.echo(json.dumps({"output": str(output), "files": [str(f) for f in result.files], "bytes": result.n_bytes, "ops": form,
                               "embedding_type": embedding_type, "group_size": graph.info.group_size, "opset": opsets,
                               "ir_version": graph.skeleton.ir_version, "nodes": len(graph.skeleton.graph.node)}))  # fmt: skip
    else:
        click.echo(f"{output}: {result.n_bytes / 1e6:.1f} MB, {form}, group size {graph.info.group_size}")
        click.echo("beside it: " + ", ".join(f.name for f in result.files[1:]))


@click.command()
@click.argument("checkpoint", type=_PATH)
@click.argument("folder", type=_PATH)
@click.option("--runtime", type=_PATH,
              help="A folder with onnxruntime-web and @huggingface/tokenizers unpacked (node_modules). Default: npm.")  # fmt: skip
@click.option("--embedding-type", type=click.Choice(["q8", "f16", "f32"]), default="q8", show_default=True,
              help="Of the embedding and of an untied head.")  # fmt: skip
@click.option("--title", help="Of the page. Default: the checkpoint's folder name.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def web(
    checkpoint: Path, folder: Path, runtime: Path | None, embedding_type: str, title: str | None, as_json: bool
) -> None:
    """Write to FOLDER a page that runs CHECKPOINT in a browser, with nothing loaded from elsewhere.

    \b
    Example:
      tmexport web ckpt/ site/ && python -m http.server -d site 8000
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.cli import _progress

    _need_onnx()
    from tmexport.onnx.site import write_site

    source = open_checkpoint(checkpoint)
    with _progress() as progress:
        task = progress.add_task("writing", total=None)
        site = write_site(source, folder, runtime, embedding_type, title, lambda: progress.advance(task))
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "files": {str(k): v for k, v in site.items()}}))
    else:
        click.echo(f"{folder}: {sum(site.values()) / 1e6:.1f} MB in {len(site)} files; try")
        click.echo(f"  {Path(sys.executable).name} -m http.server -d {folder} 8000   # then http://localhost:8000")


def verify_file(checkpoint: Checkpoint, path: Path, on_tensor: Callable[[str], None]) -> Report:
    """`tmexport verify` for an .onnx file."""
    _need_onnx()
    from tmexport.onnx.verify import verify_onnx

    return verify_onnx(checkpoint, path, on_tensor)


def inspect_file(path: Path, on_tensor: Callable[[str, int], None]) -> Summary:
    """`tmexport inspect` for an .onnx file."""
    _need_onnx()
    from tmexport.onnx.inspect import inspect_onnx

    return inspect_onnx(path, on_tensor)


def _need_onnx() -> None:
    try:
        import onnx as _  # noqa: F401
    except ImportError:
        raise UsageError('the package onnx is not installed; run: pip install "tmexport[onnx]"') from None
