"""The GPU run, one command on a bare machine with one GPU and no network: checks, speeds, then a Transformer's hybrid, ternary.

    python scripts/machines/gpu/run.py --parts .gpu --work .gpu-work --out "$OUT" --minutes 9

1. torch on the GPU against the CPU, and every scan against fp64 (scripts/machines/gpu/checks.py); a wrong one ends the run.
2. tokens a second and memory of the recipes mamba2-130m-h100 and mamba2-1.3b-h100, `--seconds` each and for each scan.
3. with what is left of `--minutes`: the teacher out of its parts, `convert`, then the stages of the recipe, their steps cut to the time.
WORK keeps everything (a second call goes on from there); OUT gets log.json after each step, and the ternary hybrid as files of at
most 15 MiB. `--collect STAGE` only packs another stage's files, for a call that brings these back.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch

from qat.convert.making import convert
from qat.model import load_model
from qat.ptq.making import calibration_ids
from qat.recipe import Recipe, load_recipe
from qat.train.stages import DEFAULTS, load_stages
from qat.train.teacher import teacher_folder
from qat.train.training import train
from scripts.demo.make_corpus import read_corpus, write_split
from scripts.machines.gpu.checks import model_error, scan_errors, speed, speed_of_recipe, variants
from scripts.machines.gpu.parts import join, pack_checkpoint
from tmexport.cli.app import run_command
from tmexport.errors import TmexportError

RECIPES = ("mamba2-130m-h100", "mamba2-1.3b-h100")
SHARES = {"align": 0.45, "distill": 0.25, "ternary": 0.3}  # of the time that is left
LIMITS = {"fp32": 1e-3, "bf16": 3e-2}  # relative error of a scan; bf16 has 8 bits
_MARGIN = 0.85  # of a stage's time that its steps are cut to: reading, saving and scoring take the rest
_PATH = click.Path(path_type=Path)


@dataclass
class Log:
    """OUT/log.json, written anew at every entry, so that a command that is cut off leaves what it found."""

    out: Path
    minutes: float
    entries: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def add(self, name: str, value: Any) -> None:
        self.entries[name] = value
        self.entries["seconds"] = round(time.monotonic() - self.began, 1)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "log.json").write_text(json.dumps(self.entries, indent=1), encoding="utf-8")
        click.echo(f"{self.entries['seconds']:7.1f} s  {name}: {json.dumps(value)}", err=True)

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.began)


def check(device: torch.device, log: Log, tiny: bool) -> None:
    """Raises TmexportError where the device computes something else."""
    small = {"time_steps": 70, "heads": 4, "width": 16} if tiny else {}
    errors = {"model fp32": model_error(device), **scan_errors(device, **small)}
    log.add("checks", errors)
    for name, error in errors.items():
        limit = LIMITS["fp32" if "fp32" in name else "bf16"]
        if not error < limit:
            raise TmexportError(f"{name}: differs from the CPU by {error:.2g}; expected less than {limit:g}")


def measure(device: torch.device, log: Log, seconds: float, change: Mapping[str, Any]) -> None:
    """The speeds of the recipes; what one cannot do is said and the next is tried."""
    for name in RECIPES:
        recipe = replace(load_recipe(name, "student", {}), **change)
        for kind, variant in variants(recipe, device).items():
            try:
                log.add(f"{name}, {kind}", speed_of_recipe(variant, device, seconds))
            except RuntimeError as error:  # out of memory, or what torch.compile cannot
                log.add(f"{name}, {kind}", {"error": str(error).split("\n")[0][:200]})
            if device.type == "cuda":
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class Chain:
    """From the Transformer to its ternary hybrid, in `work`."""

    work: Path
    teacher: Path
    recipe: str
    keep: str
    samples: int
    change: Mapping[str, Any]

    @property
    def data(self) -> Path:
        return self.work / "train.jsonl"

    @property
    def held_out(self) -> Path:
        return self.work / "heldout.jsonl"

    def convert(self, log: Log) -> Path:
        """The hybrid's folder, made now if it is not there."""
        hybrid = self.work / "hybrid"
        if not hybrid.is_dir():
            length = int(self.change.get("seq_len", 512))
            ids = calibration_ids(self.teacher, [self.data], None, self.samples, length, 0, self.work / "cache")
            made = convert(self.teacher, self.keep, hybrid, ids)
            log.add("converted", {"kept": made.cost.kept, "costs": made.ranks, "errors": made.errors})
        return hybrid

    def stages(self, log: Log, device: torch.device) -> None:
        """Each stage with as many steps as its share of the time has room for, by its own speed; saved as it goes."""
        student = self.convert(log)
        recipes = load_stages(self.recipe, self.change)
        for stage, recipe in recipes.items():
            imitated = student if stage == "ternary" else self.teacher
            later = sum(SHARES.get(name, 0.0) for name in list(recipes)[list(recipes).index(stage) :])
            seconds = log.left * SHARES.get(stage, 0.0) / later
            if seconds <= 0:
                log.add(stage, "no time was left; call again with the same --work")
                return
            summary = self._train(log, device, stage, recipe, imitated, student, seconds)
            log.add(stage, summary)
            student = self.work / stage
            if stage == "ternary":
                log.add("files", [path.name for path in pack_checkpoint(student, log.out)])

    def _train(
        self, log: Log, device: torch.device, stage: str, recipe: Recipe, teacher: Path, student: Path, seconds: float
    ) -> dict[str, Any]:
        steps = self.work / f"{stage}.steps"
        if not steps.is_file():  # kept, so that a second call goes on with the same
            models = [load_model(folder).to(device) for folder in (student, teacher)]
            found = speed(models[0], models[1].requires_grad_(False), recipe, device, min(10.0, seconds / 10))
            del models
            log.add(f"{stage} speed", found)
            room = _MARGIN * seconds * found["tokens_per_second"] / recipe.tokens_per_step
            steps.write_text(str(max(1, min(recipe.steps, int(room)))))
        count = int(steps.read_text())
        every = max(1, count // 4)
        cut = replace(recipe, steps=count, eval_every=every, save_every=every, minutes=seconds / 60)
        where = self.work / stage
        return train(
            cut, [self.data], where, teacher, [self.held_out], None, True, self.work / "cache", (), student, stage
        )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--parts", required=True, type=_PATH, help="Folder with the teacher's parts (scripts/machines/gpu/parts.py)."
)
@click.option("--work", required=True, type=_PATH, help="Folder for everything that is made.")
@click.option("--out", required=True, type=_PATH, help="Folder for what is brought back.")
@click.option("--minutes", default=9.0, show_default=True, help="For all of it.")
@click.option("--seconds", default=60.0, show_default=True, help="A recipe's speed is measured over, for each scan.")
@click.option("--recipe", default="smollm2-135m-h100", show_default=True, help="Of the stages: a name or a TOML file.")
@click.option("--keep", default="auto", show_default=True, help="As tmexport convert.")
@click.option("--tiny", is_flag=True, help="The dry run: small shapes for the checks and the speeds.")
@click.option("--collect", type=click.Choice(list(DEFAULTS)), help="Only pack the files of this stage.")
def main(
    parts: Path, work: Path, out: Path, minutes: float, seconds: float, recipe: str, keep: str, tiny: bool,
    collect: str | None,
) -> None:  # fmt: skip
    """Checks, speeds, and a ternary hybrid, in the time of one machine."""
    log = Log(out, minutes)
    if collect is not None:
        log.add("files", [path.name for path in pack_checkpoint(work / collect, out)])
        return
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.add("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    check(device, log, tiny)
    small: dict[str, Any] = {
        "d_model": 64,
        "n_layer": 1,
        "headdim": 32,
        "d_state": 16,
        "vocab_size": 300,
        "group_size": 64,
    }
    small |= {"seq_len": 32, "batch_size": 2, "accumulate": 1, "dtype": "float32"}
    measure(device, log, seconds, small if tiny else {})
    if not (work / "train.jsonl").is_file():
        speeches = read_corpus()
        write_split(speeches[:12] if tiny else speeches, work / "train.jsonl", work / "heldout.jsonl")
    teacher = teacher_folder(join(parts, work / "teacher.gguf"), work / "cache")
    change = {"seq_len": 32, "batch_size": 2, "dtype": "float32", "threads": 1, "eval_tokens": 64} if tiny else {}
    Chain(work, teacher, recipe, keep, 4 if tiny else 48, change).stages(log, device)
    click.echo(json.dumps(log.entries))


if __name__ == "__main__":
    run_command(main, "python scripts/machines/gpu/run.py")
