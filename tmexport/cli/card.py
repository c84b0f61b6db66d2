"""`tmexport card`."""

from __future__ import annotations

from pathlib import Path

import click

from tmexport.cli.options import HELP, PATH


@click.command(context_settings=HELP)
@click.argument("folder", metavar="DIR", type=PATH)
@click.option("--base-model", metavar="ID", help="What it was made from, as the Hub calls it.")
@click.option("--dataset", "datasets", metavar="ID", multiple=True, help="A data set of the Hub it was trained on; repeatable.")  # fmt: skip
@click.option("--license", "license_", metavar="ID", help="As the Hub calls it: apache-2.0, mit, ...")
@click.option("--evaluation", "evaluations", metavar="FILE", multiple=True, type=PATH,
              help="What evaluate, perplexity or zero-shot printed with --json, about files in DIR; repeatable.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace the README.md that is there.")
def card(
    folder: Path,
    base_model: str | None,
    datasets: tuple[str, ...],
    license_: str | None,
    evaluations: tuple[Path, ...],
    overwrite: bool,
) -> None:
    """Write DIR/README.md, the model card of a checkpoint folder, from what its files and evaluations say.

    \b
    Example:
      tmexport zero-shot student --tasks piqa --json > piqa.json
      tmexport card student --base-model state-spaces/mamba2-130m --evaluation piqa.json
    """
    from tmexport.card import Said, write_card

    path = write_card(folder, Said(base_model, datasets, license_), evaluations, overwrite)
    click.echo(f"{click.format_filename(path)}: {len(evaluations)} evaluations")
