"""`tmexport onnx`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmexport.cli.options import (
    EMBEDDINGS,
    HELP,
    PATH,
    json_option,
    no_tokenizer_option,
    onnx_embedding_option,
    round_scales_option,
    tokenizer_option,
)
from tmexport.cli.progress import progress_bar
from tmexport.errors import UsageError
from tmexport.extras import import_with
from tmexport.files import refuse_overwriting

if TYPE_CHECKING:
    from tmexport.onnx.names import ModelInfo


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=PATH)
@click.argument("output", type=PATH)
@click.option("--ops", "form", type=click.Choice(["ort", "portable", "custom"]), default="ort", show_default=True,
              help="ort: onnxruntime's 2-bit kernels. portable: standard operators only. custom: ours, as functions.")  # fmt: skip
@click.option("--type", "projections", type=click.Choice(["auto", "f16", "f32"]), default="auto", show_default=True,
              help="Of the projections. auto: the codes that they are, or exactly ternary values.")  # fmt: skip
@onnx_embedding_option
@click.option("--opset", type=int, help="Version of ai.onnx. Default: the oldest that works (15; 23 for ort).")
@click.option("--io-names", type=click.Choice(["tmexport", "genai", "transformers.js"]), default="tmexport", show_default=True,
              help="past_ssm.0 ...; those of onnxruntime-genai, with its genai_config.json; or those of transformers.js.")  # fmt: skip
@click.option("--logits", type=click.Choice(["all", "last"]), default="all", show_default=True,
              help="Of every position, or of the last one only (a faster prefill).")  # fmt: skip
@round_scales_option
@tokenizer_option
@no_tokenizer_option
@json_option
def onnx(
    checkpoint: Path,
    output: Path,
    form: str,
    projections: str,
    embedding_type: str,
    opset: int | None,
    io_names: str,
    logits: str,
    round_scales: bool,
    tokenizer: Path | None,
    no_tokenizer: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT (of low-bit weights, or a dense one whose projections are exactly ternary) to OUTPUT, an ONNX file.

    OUTPUT's config and tokenizer are written beside it (model.config.json, model.tokenizer.json). With --io-names genai
    OUTPUT's folder gets what onnxruntime-genai looks for as well: genai_config.json, tokenizer.json, tokenizer_config.json.

    \b
    Examples:
      tmexport onnx ckpt/ model.onnx
      tmexport onnx ckpt/ model.onnx --ops portable --embedding-type f16
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.tokenizer.gguf import export_tokenizer

    export_onnx = import_with("onnx", "tmexport.onnx.export").export_onnx
    build_graph = import_with("onnx", "tmexport.onnx.graph").build_graph
    genai_files = import_with("onnx", "tmexport.onnx.genai").genai_files

    if tokenizer and no_tokenizer:
        raise click.UsageError("--tokenizer and --no-tokenizer exclude each other")
    source = open_checkpoint(checkpoint, round_scales)
    refuse_overwriting(output, checkpoint, tokenizer)
    graph = build_graph(source, form, EMBEDDINGS[embedding_type], opset, io_names, logits, projections)
    if io_names == "genai" and output.parent.resolve() == checkpoint.resolve():
        raise UsageError(f"{output}: lies in the checkpoint's folder, whose tokenizer.json onnxruntime-genai's would replace; name another folder")  # fmt: skip
    path = None if no_tokenizer else tokenizer or source.tokenizer
    codec = None if path is None else export_tokenizer(path, source.config, source.path)
    for sentence in codec.sentences() if codec else ():
        click.echo(f"warning: {sentence}", err=True)
    if path is None and not no_tokenizer:
        click.echo("warning: no tokenizer.json in the checkpoint; none is written beside the file (see --tokenizer)", err=True)  # fmt: skip
    with progress_bar("writing", len(graph.initializers), unit="tensors") as bar:
        more = genai_files(output, source.config, codec) if io_names == "genai" else {}
        text = codec.text if codec else None
        result = export_onnx(output, graph, text, lambda tensor: bar.advance(), no_tokenizer, more)
    if as_json:
        opsets = {o.domain or "ai.onnx": o.version for o in graph.skeleton.opset_import}
        click.echo(json.dumps({"output": str(output), "files": [str(f) for f in result.files], "warnings": codec.sentences() if codec else (), "bytes": result.n_bytes, "ops": form,
                               "embedding_type": embedding_type, "group_size": graph.info.group_size, "opset": opsets,
                               "ir_version": graph.skeleton.ir_version, "nodes": len(graph.skeleton.graph.node)}))  # fmt: skip
    else:
        click.echo(f"{output}: {result.n_bytes / 1e6:.1f} MB, {form}, {_weights(graph.info)}")
        click.echo("beside it: " + ", ".join(f.name for f in result.files[1:]))


def _weights(info: ModelInfo) -> str:
    """How the projections are stored, in words."""
    forms = {s.kind for s in info.weights.values()} or {info.dense_type}
    size = info.group_size
    return (
        f"group size {size}"
        if forms == {"ternary"}
        else " and ".join(sorted(forms)) + (f", group size {size}" if size else "")
    )
