"""`tmexport synthesize`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from qat.synthesis.answers import Drawing, load_writer, synthesize
from qat.train.teacher import teacher_folder
from tmexport.cli.options import HELP, PATH, json_option, threads_option, tokenizer_option
from tmexport.cli.progress import progress_bar
from tmexport.documents import read_documents
from tmexport.threads import default_threads


@click.command("synthesize", context_settings=HELP)
@click.option("--teacher", required=True, type=PATH, help="The model that writes: a checkpoint folder or a llama GGUF.")
@click.option("--prompts", required=True, type=PATH, help='JSON Lines, a prompt in the "text" of each.')
@click.option("--out", required=True, type=PATH, help="JSON Lines to write.")
@click.option("--raw", is_flag=True, help="Continue the prompts as they are, without the model's chat template.")
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=384,
    show_default=True,
    help="Of prompt and answer together; a prompt may take half.",
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=1.0, show_default=True, help="0 takes the likeliest token."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the draw.")
@click.option(
    "--batch", type=click.IntRange(1), default=64, show_default=True, help="Prompts that are answered together."
)
@tokenizer_option
@threads_option
@json_option
def main(
    teacher: Path, prompts: Path, out: Path, raw: bool, max_tokens: int, temperature: float, seed: int, batch: int,
    tokenizer: Path | None, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Let a teacher write its own training text: its answers to prompts, a line each with prompt, seed and text.

    What a student is distilled on may well be what its teacher says. An interrupted run goes on with the same command.

    \b
    Example:
      tmexport synthesize --teacher smollm2.gguf --prompts prompts.jsonl --out written.jsonl
    """
    torch.set_num_threads(threads or default_threads())
    asked = list(read_documents(prompts))
    began = time.monotonic()
    with TemporaryDirectory() as cache:
        writer = load_writer(teacher_folder(teacher, Path(cache)), tokenizer, raw)
    with progress_bar("writing", len(asked), unit="prompts") as bar:
        drawing = Drawing(max_tokens, temperature, seed, batch)
        made = synthesize(writer, asked, drawing, out, bar.advance)
    if as_json:
        click.echo(json.dumps({"out": str(out), **made, "seconds": time.monotonic() - began}))
        return
    passed = f"; {made['passed_over']} prompts are empty or too long" if made["passed_over"] else ""
    click.echo(f"{out}: {made['answers']} answers, {made['tokens']} tokens, {time.monotonic() - began:.0f} s{passed}")
