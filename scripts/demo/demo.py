"""The whole way from text to a ternary Mamba-2 on the CPU, in one command: `make demo`.

Every step is a subprocess of a documented command, printed before it runs. Finished steps are reused, an interrupted
training goes on. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.rule import Rule

from scripts.demo.curves import draw_curves
from scripts.demo.make_corpus import SHIPPED, read_corpus, write_split
from scripts.demo.plan import PROMPT, SCALES, SHIPPED_TEACHER, Layout, Scale, sections
from scripts.demo.report import (
    closing_list,
    comparison,
    first_difference,
    proof_of_the_file,
    results_of,
    sample_line,
    table,
)
from scripts.demo.steps import Records, content_hash, duration, run_step
from tmexport.cli.app import run_command
from tmexport.errors import UsageError
from tmexport.files import atomic_write


def unpack(layout: Layout, scale: Scale, records: Records) -> str:
    """The corpus as two JSONL files, written only if they are not there yet; returns a line about them."""
    wanted = {"speeches": scale.speeches, "inputs": content_hash([SHIPPED])}
    record, files = records.read("corpus"), [layout.train, layout.held_out]
    if any(record.get(key) != value for key, value in wanted.items()) or record.get("outputs") != content_hash(files):
        layout.train.parent.mkdir(parents=True, exist_ok=True)
        sizes = write_split(read_corpus()[: scale.speeches], *files)
        record = wanted | {"outputs": content_hash(files), "sizes": list(sizes)}
        records.write("corpus", record)
    trained, held_out = record["sizes"]
    return f"{trained / 1e6:.2f} MB of speeches to train on, {held_out / 1e6:.2f} MB held out: {layout.train}, {layout.held_out}"


def take_teacher(layout: Layout, records: Records) -> str:
    """The pretrained checkpoint that comes with the repository, copied only if it is not there yet; returns a line about it."""
    names = ("config.json", "tokenizer.json", "model.safetensors")
    shipped, files = [SHIPPED_TEACHER / name for name in names], [layout.checkpoint("teacher") / name for name in names]
    wanted = {"inputs": content_hash(shipped)}
    record = records.read("teacher")
    if record.get("inputs") != wanted["inputs"] or record.get("outputs") != content_hash(files):
        layout.checkpoint("teacher").mkdir(parents=True, exist_ok=True)
        for source, target in zip(shipped, files, strict=True):
            with atomic_write(target) as file:
                file.write(source.read_bytes())
        records.write("teacher", wanted | {"outputs": content_hash(files)})
    size = sum(file.stat().st_size for file in files)
    return f"{layout.checkpoint('teacher')}: a Mamba-2 in fp16, {size / 1e6:.2f} MB, trained on 8.2 million tokens (docs/demo.md)"


def run(out: Path, scale_name: str, from_scratch: bool, console: Console) -> dict[str, Any]:
    """The whole demo; returns the JSON object of the last line."""
    began = time.monotonic()
    layout, scale = Layout(out, from_scratch), SCALES[scale_name]
    if out.exists() and any(out.iterdir()) and not layout.records.is_dir():
        raise UsageError(f"{out}: is not empty and was not made by this demo; choose another folder with --out")
    records = Records(layout.records)
    plan = sections(layout, scale)
    first = 2 if from_scratch else 3
    total = len(plan) + first

    def heading(number: int, title: str) -> None:
        console.print()
        console.print(Rule(f"[bold]{number}/{total}  {title}", align="left", style="cyan"))

    heading(1, "Unpack the corpus: the State of the Union speeches, 1790 to 2021")
    console.print(f"  {unpack(layout, scale, records)}", style="green", highlight=False, soft_wrap=True)
    if not from_scratch:
        heading(2, "Take a pretrained model: the teacher")
        console.print(f"  {take_teacher(layout, records)}", style="green", highlight=False, soft_wrap=True)
    for number, (title, steps) in enumerate(plan.items(), first):
        heading(number, title)
        for step in steps:
            console.print(f"$ {step.shown}", style="dim", soft_wrap=True, highlight=False, markup=False)
            run_step(
                step, records, lambda line: console.print(f"  {line}", style="green", highlight=False, soft_wrap=True)
            )
    heading(total, "What came of it")
    results = results_of({step.name: step for steps in plan.values() for step in steps}, records, PROMPT)
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode())
    before = layout.checkpoint("teacher") if from_scratch else None
    draw_curves(before, layout.checkpoint("student"), results, out / "curves.png")
    console.print(comparison(results))
    console.print(first_difference(results), highlight=False)
    console.print(f"\n{sample_line(results)}", highlight=False, markup=False)
    console.print()
    console.print(table(results))
    console.print(proof_of_the_file(results), highlight=False)
    console.print()
    console.print(f"What lies in {out}/", style="bold", highlight=False)
    for line in closing_list(out):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"\nThis run took {duration(time.monotonic() - began)}.", highlight=False)
    return {
        "results": str(out / "results.json"),
        "recovery_percent": results["recovery_percent"],
        "bits_per_byte": {name: model["bits_per_byte"] for name, model in results["models"].items()},
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    default=Path("demo_out"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for everything the demo makes.",
)
@click.option(
    "--scale",
    type=click.Choice(list(SCALES)),
    default="demo",
    show_default=True,
    help="tiny: a minute at most and no quality; for the tests.",
)
@click.option("--from-scratch", is_flag=True, help="Train the teacher too, instead of taking the one that comes along.")
def main(out: Path, scale: str, from_scratch: bool) -> None:
    """Make a pretrained Mamba-2 ternary, export it to GGUF, prove the file, and run it in two runtimes.

    Stop it at any time; the same command goes on from there, and reuses what is finished.

    Example: python scripts/demo/demo.py --out demo_out
    """
    try:
        click.echo(json.dumps(run(out, scale, from_scratch, Console())))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; run the same command to go on from here") from None


if __name__ == "__main__":
    run_command(main, "scripts/demo/demo.py")
