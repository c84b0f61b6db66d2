"""`tmexport web`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tmexport.cli.options import (
    HELP,
    PATH,
    Choice,
    json_option,
    round_scales_option,
    tokenizer_option,
    warn_of_rounded_scales,
)
from tmexport.cli.progress import progress_bar


@click.command(context_settings=HELP)
@click.argument("model", type=PATH)
@click.argument("folder", type=PATH)
@click.option("--runtime", type=PATH,
              help="A node_modules folder with @huggingface/tokenizers, and onnxruntime-web where the page runs ONNX. Default: npm.")  # fmt: skip
@click.option("--embedding-type", type=Choice(["q8_0", "f16"], old={"q8": "q8_0"}), default="q8_0", show_default=True,
              help="Type of a checkpoint's embedding and of an untied head; a GGUF is taken as it is.")  # fmt: skip
@round_scales_option
@tokenizer_option
@click.option("--title", help="Of the page. Default: the model's name.")
@json_option
def web(
    model: Path,
    folder: Path,
    runtime: Path | None,
    embedding_type: str,
    round_scales: bool,
    tokenizer: Path | None,
    title: str | None,
    as_json: bool,
) -> None:
    """Write to FOLDER a page that runs MODEL, a checkpoint folder or a GGUF of a Mamba-2, with nothing loaded from elsewhere.

    A ternary Mamba-2 runs in WebAssembly of our own with its weights packed; everything else as ONNX.

    \b
    Examples:
      tmexport web ckpt/ site/ && python -m http.server -d site 8000
      tmexport web model.gguf site/
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.reader import open_gguf
    from tmexport.web.models import from_checkpoint, from_gguf
    from tmexport.web.site import write_site

    if model.is_file():
        page = from_gguf(open_gguf(model), tokenizer)
    else:
        source = open_checkpoint(model, round_scales)
        page = from_checkpoint(source, embedding_type, tokenizer)
        if round_scales:
            warn_of_rounded_scales(source)
    with progress_bar("writing", None) as bar:
        site = write_site(
            page,
            folder,
            title or (model.resolve().stem if model.is_file() else model.resolve().name),
            runtime,
            bar.advance,
        )
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "engine": page.engine, "files": site}))
    else:
        click.echo(f"{folder}: {sum(site.values()) / 1e6:.1f} MB in {len(site)} files; try")
        click.echo(f"  {Path(sys.executable).name} -m http.server -d {folder} 8000   # then http://localhost:8000")
