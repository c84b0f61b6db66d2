"""`tmexport doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from tmexport.cli.options import HELP, PATH, json_option


@click.command(context_settings=HELP)
@click.argument("path", metavar="FILE.gguf", type=PATH)
@click.option(
    "--fix", "out", type=PATH, help="Write the same weights in stock types to this file, if that is lossless."
)
@json_option
def doctor(path: Path, out: Path | None, as_json: bool) -> None:
    """Say what FILE.gguf, of any program, is: its types, what loads it, and what is wrong with it.

    Exits with 0 if nothing is wrong (or --fix mended it), 1 if something is, 2 for a wrong use.

    \b
    Examples:
      tmexport doctor model.gguf
      tmexport doctor theirs.gguf --fix stock.gguf
    """
    from tmexport.doctor import diagnose, write_fixed

    found = diagnose(path)
    fixed = write_fixed(path, out) if out is not None else None
    if as_json:
        click.echo(json.dumps(asdict(found) | {"fixed": fixed, "output": str(out) if out else None}))
    else:
        name = click.format_filename(path)
        types = ", ".join(f"{count} {kind}" for kind, count in found.types.items()) or "none"
        click.echo(f"{name}: {found.architecture or 'no architecture'}; tensors: {types}; ternary: {found.variant}")
        click.echo(f"loads in: {', '.join(found.loads) or 'nothing known'}")
        for sentence in found.problems:
            click.echo(f"problem: {sentence}")
        for sentence in found.notes:
            click.echo(f"note: {sentence}")
        if found.fix is not None and fixed is None:
            click.echo(f"--fix OUT writes {found.fix}")
        if fixed is not None:
            click.echo(f"{out}: {fixed} tensors in stock types, the same codes and scales")
    after = diagnose(out).problems if out is not None else found.problems
    if after:
        raise click.exceptions.Exit(1)
