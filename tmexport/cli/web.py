"""`tmexport web`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from tmexport.cli.options import (
    EMBEDDINGS,
    HELP,
    PATH,
    json_option,
    onnx_embedding_option,
    round_scales_option,
    warn_of_rounded_scales,
)
from tmexport.cli.progress import progress_bar
from tmexport.extras import import_with


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=PATH)
@click.argument("folder", type=PATH)
@click.option("--runtime", type=PATH,
              help="A folder with onnxruntime-web and @huggingface/tokenizers unpacked (node_modules). Default: npm.")  # fmt: skip
@onnx_embedding_option
@round_scales_option
@click.option("--title", help="Of the page. Default: the checkpoint's folder name.")
@json_option
def web(
    checkpoint: Path,
    folder: Path,
    runtime: Path | None,
    embedding_type: str,
    round_scales: bool,
    title: str | None,
    as_json: bool,
) -> None:
    """Write to FOLDER a page that runs CHECKPOINT in a browser, with nothing loaded from elsewhere.

    \b
    Example:
      tmexport web ckpt/ site/ && python -m http.server -d site 8000
    """
    from tmexport.checkpoint import open_checkpoint

    write_site = import_with("onnx", "tmexport.onnx.site").write_site

    source = open_checkpoint(checkpoint, round_scales)
    if round_scales:
        warn_of_rounded_scales(source)
    with progress_bar("writing", None) as bar:
        site = write_site(source, folder, runtime, EMBEDDINGS[embedding_type], title, bar.advance)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "files": {str(k): v for k, v in site.items()}}))
    else:
        click.echo(f"{folder}: {sum(site.values()) / 1e6:.1f} MB in {len(site)} files; try")
        click.echo(f"  {Path(sys.executable).name} -m http.server -d {folder} 8000   # then http://localhost:8000")
