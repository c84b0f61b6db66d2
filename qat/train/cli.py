"""Train a ternary student from a full-precision teacher, or a small teacher from nothing.

    python -m qat.train --from-scratch --recipe demo-cpu --data speeches.jsonl --out out/teacher
    python -m qat.train --teacher out/teacher --recipe demo-cpu --data speeches.jsonl --out out/student

OUT gets the checkpoint (config.json, model.safetensors, tokenizer.json), the resolved recipe.toml, metrics.jsonl,
curves.png, and in checkpoints/ what --resume needs.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from qat.plan import ACCELERATORS, Plan, config_of, describe, make_plan
from qat.recipe import Recipe, known_recipes, load_recipe, options
from qat.train.stages import load_stages, train_stages
from qat.train.teacher import teacher_folder
from qat.train.training import train
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import UsageError


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--teacher", type=click.Path(path_type=Path), help="The full-precision model: a checkpoint folder or a llama GGUF."
)
@click.option(
    "--student",
    type=click.Path(path_type=Path),
    help="A hybrid of the teacher (tmexport convert): run the stages of the recipe on it.",
)
@click.option("--from-scratch", is_flag=True, help="Train a full-precision model from nothing instead.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Text, JSON Lines, Parquet, a folder, or hf:NAME[:CONFIG[:SPLIT]], read through datasets; repeatable.",
)
@click.option(
    "--held-out", multiple=True, type=click.Path(path_type=Path), help="Text to score during training; repeatable."
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the result.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer.json, if the teacher's folder has none.")
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Folder for tokens and teacher's predictions. Default: OUT/cache."
)
@click.option("--recipe", "recipe_name", help="A TOML file, or a name: " + ", ".join(known_recipes()))
@click.option("--resume", is_flag=True, help="Go on with the run in OUT, if there is one.")
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Print what the recipe, or each of its stages, costs (memory, FLOPs, hours) and stop.",
)
@click.option("--accelerator", default="h100", show_default=True, help="For --plan: " + ", ".join(ACCELERATORS))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@options
def main(
    teacher: Path | None,
    student: Path | None,
    from_scratch: bool,
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    out: Path | None,
    tokenizer: Path | None,
    cache: Path | None,
    recipe_name: str | None,
    resume: bool,
    plan_only: bool,
    accelerator: str,
    as_json: bool,
    **flags: Any,
) -> None:
    """Train a ternary student from a teacher (quantisation-aware training with distillation).

    \b
    Example:
      tmexport train --teacher mamba2-130m --data text/ --out student --steps 2000 --lr 2.5e-4
    """
    if plan_only:
        _say_plans(_plans(teacher, student, from_scratch, recipe_name, accelerator, flags), as_json)
        return
    if (teacher is None) != from_scratch:
        raise UsageError("give either --teacher DIR or --from-scratch")
    if not data or out is None:
        raise UsageError("give the text with --data and a folder for the result with --out")
    try:
        if student is not None:
            stages = _stages(recipe_name, teacher, flags)
            assert teacher is not None
            said = train_stages(
                stages, list(data), out, teacher, student, list(held_out), tokenizer, resume, cache
            )  # fmt: skip
            _say(said, as_json)
            return
        recipe = load_recipe(recipe_name, "student" if teacher else "teacher", flags)
        summary = train(recipe, list(data), out, teacher, list(held_out), tokenizer, resume, cache)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; go on with the same command and --resume (state in {out / ('checkpoints' if student is None else '*/checkpoints')})"
        ) from None
    _say({"": summary}, as_json)


def _plans(
    teacher: Path | None,
    student: Path | None,
    from_scratch: bool,
    recipe_name: str | None,
    accelerator: str,
    flags: dict[str, Any],
) -> dict[str, Plan]:
    """The plan of a run, under no name, or of each stage."""
    with TemporaryDirectory() as cache:
        folder = None if teacher is None else teacher_folder(teacher, Path(cache))
        config = None if folder is None else open_checkpoint(folder).config
    if student is None:
        recipe = load_recipe(recipe_name, "teacher" if from_scratch else "student", flags)
        config = config or config_of(recipe)
        return {"": make_plan(recipe, config, accelerator, None if from_scratch else config)}
    hybrid = open_checkpoint(student).config
    return {
        stage: make_plan(recipe, hybrid, accelerator, hybrid if stage == "ternary" else config)
        for stage, recipe in _stages(recipe_name, config, flags).items()
    }


def _stages(recipe_name: str | None, teacher: Any, flags: dict[str, Any]) -> dict[str, Recipe]:
    if teacher is None or recipe_name is None:
        raise UsageError("--student needs the Transformer with --teacher, and the stages with --recipe")
    return load_stages(recipe_name, flags)


def _say_plans(plans: dict[str, Plan], as_json: bool) -> None:
    if as_json:
        said = {stage: asdict(plan) for stage, plan in plans.items()}
        click.echo(json.dumps(said.get("", said)))
        return
    for stage, plan in plans.items():
        click.echo(f"[{stage}]\n{describe(plan)}\n" if stage else describe(plan))
    if len(plans) > 1:
        hours = sum(plan.hours for plan in plans.values())
        click.echo(f"all stages   {hours:.2f} hours on one {next(iter(plans.values())).accelerator}")


def _say(summaries: dict[str, dict[str, Any]], as_json: bool) -> None:
    """The summary of a run, or of each stage by its name."""
    if int(os.environ.get("RANK", "0")):
        return  # one process speaks for all
    if as_json:
        click.echo(json.dumps(summaries.get("", summaries)))
        return
    for summary in summaries.values():
        score = summary["held_out_bits_per_byte"]
        shown = f", {score:.4f} bits per byte held out" if score is not None else ""
        click.echo(
            f"{summary['out']}: {summary['steps']} steps, {summary['tokens']} tokens, {summary['seconds']:.0f} s{shown}"
        )
