"""`tmexport import`."""

from __future__ import annotations

from pathlib import Path

import click

from tmexport.cli.options import HELP, PATH
from tmexport.cli.progress import progress_bar


@click.command("import", context_settings=HELP)
@click.argument("gguf", type=PATH)
@click.argument("folder", type=PATH)
def import_(gguf: Path, folder: Path) -> None:
    """Write FOLDER, a full-precision checkpoint, from GGUF, a llama in F16, Q8_0, Q4_0 or Q4_1: a teacher, or to export anew.

    \b
    Example:
      tmexport import SmolLM2-135M-Instruct.Q4_1.gguf smollm2/
    """
    from tmexport.gguf.importing import import_gguf

    with progress_bar("reading", None, unit="tensors") as bar:
        model = import_gguf(gguf, folder, lambda name, total: bar.advance_of(total))
    click.echo(f"{click.format_filename(folder)}: {model.family}, {len(model.tensors)} tensors")
