"""The study behind docs/training.md: every variant of the recipe and every method without training, several seeds, one table.

    python scripts/studies/qat_variants.py --teacher out/teacher --data train.jsonl --held-out heldout.jsonl --out study --seeds 3

Trains (`qat.train`) every variant and seed on the same number of tokens, and applies every method of `qat.ptq` and scripts/studies/untrained.py, where the
seed picks the calibration text; scores all on the held-out text, document by document. What is done is kept: runs in
OUT/<variant>-<seed>, scores in OUT/scores/, and a second start goes on where the first stopped. Writes OUT/table.md (every
score there is), OUT/zero_ratio.png (over time, of every trained variant) and, last on stdout, one JSON object.
recovery = (rounding - variant) / (rounding - teacher), in bits per byte, rounding with groups of 256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch

from qat.data import find_files
from qat.evaluate import documents_in, find_tokenizer, score_document
from qat.model import LanguageModel, load_model
from qat.ptq.making import calibration_ids, make
from qat.recipe import load_recipe
from qat.train.training import train
from scripts.studies.untrained import CORRECTIONS
from tmexport.cli.app import run_command
from tmexport.documents import score_documents
from tmexport.errors import UsageError
from tmexport.files import atomic_write

VARIANTS: dict[str, dict[str, float | int | bool]] = {
    "QAT 0.5/0.5": {},
    "CE only": {"kd_weight": 0.0},
    "KD only": {"kd_weight": 1.0},
    "group 128": {"group_size": 128},
    "group 64": {"group_size": 64},
    "learned scale": {"learned_scale": True, "allow_collapse": True},
    "learned scale, learning rate 1e-2": {"learned_scale": True, "allow_collapse": True, "lr": 1e-2},
    "20 steps of alignment first": {"align_steps": 20},
}
ROUNDING = {f"round to nearest, group {size}": size for size in (256, 128, 64)}
ROUNDED = {"GPTQ-style": "gptq", "AWQ-like": "awq", "sigma-delta": "sigma-delta"}  # groups of 256
WITHOUT_SEED = {"teacher", *ROUNDING, "sigma-delta"}  # these read no text
NAMES = ["teacher", *ROUNDING, *ROUNDED, *CORRECTIONS, *VARIANTS]
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Study:
    """What all runs have in common. `steps` None: the recipe's."""

    teacher: Path
    data: list[Path]
    held_out: list[Path]
    out: Path
    steps: int | None
    sequences: int
    threads: int

    @cached_property
    def model(self) -> LanguageModel:
        return load_model(self.teacher).requires_grad_(False)

    def score(self, model: LanguageModel) -> dict[str, float]:
        """Bits per byte of all documents of the held-out text, and the share of zeros in the projections."""
        documents = documents_in(self.held_out, find_tokenizer(self.teacher, None), model.config)
        score = score_documents(documents, partial(score_document, model))
        with torch.no_grad():
            zeros = [1 - m.weight.count_nonzero().item() / m.weight.numel() for m in model.projections().values()]
        return {"bits_per_byte": score.bits_per_byte, "zero_ratio": mean(zeros)}

    def folder(self, name: str, seed: int) -> Path:
        return self.out / f"{_slug(name)}-{seed}"

    def run(self, name: str, seed: int) -> dict[str, float]:
        """Make the model of one row and score it."""
        if name in VARIANTS:
            # The study keeps its own rates: the recipe serves the demo
            flags: dict[str, Any] = {"lr": 1.5e-3, "warmup": 0.05, "kd_weight": 0.5}
            flags |= {"steps": self.steps, "seed": seed, "threads": self.threads, "log_every": 5, **VARIANTS[name]}
            recipe = load_recipe("demo-cpu", "student", flags)
            train(recipe, self.data, self.folder(name, seed), self.teacher, resume=True, cache=self.out / "cache")
            return self.score(load_model(self.folder(name, seed)))
        torch.set_num_threads(self.threads)
        if name == "teacher":
            return self.score(self.model)
        ids = calibration_ids(self.teacher, self.data, None, self.sequences, 256, seed, self.out / "cache")
        if name in CORRECTIONS:
            return self.score(CORRECTIONS[name](self.model, ids, 256))
        make(ROUNDED.get(name, "rtn"), self.teacher, self.folder(name, seed), "ternary", ROUNDING.get(name, 256), ids)
        return self.score(load_model(self.folder(name, seed)))

    def fingerprint(self, name: str) -> dict[str, Any]:
        """What a score depends on; another teacher, text or budget makes it worthless."""
        weights = hashlib.sha256((self.teacher / "model.safetensors").read_bytes()).hexdigest()[:16]
        texts = [
            [str(path), path.stat().st_size if path.is_file() else 0]
            for path in find_files([*self.data, *self.held_out])
        ]
        budget = self.steps if name in VARIANTS else self.sequences if name in (*ROUNDED, *CORRECTIONS) else None
        return {"teacher": weights, "texts": texts, "budget": budget}

    def kept(
        self, name: str, seed: int, make: Callable[[str, int], dict[str, float]] | None
    ) -> dict[str, float] | None:
        """The score in OUT/scores, or else made now by `make` and kept there; None without it."""
        path = self.out / "scores" / f"{_slug(name)}-{seed}.json"
        made_with = self.fingerprint(name)
        if path.is_file():
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["made_with"] == made_with:
                return entry
        if make is None:
            return None
        click.echo(f"{name}, seed {seed}", err=True)
        entry = {"name": name, "seed": seed, **make(name, seed), "made_with": made_with}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps(entry).encode())
        return entry


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-").replace(",", "")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--teacher", required=True, type=_PATH, help="checkpoint folder")
@click.option("--data", multiple=True, required=True, type=_PATH, help="text to train and calibrate on; repeatable")
@click.option("--held-out", multiple=True, required=True, type=_PATH, help="text to score; repeatable")
@click.option("--out", required=True, type=_PATH, help="folder for all runs")
@click.option("--steps", type=click.IntRange(1), help="of every training, instead of the recipe's")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="runs of every row")
@click.option("--sequences", default=32, show_default=True, help="calibration sequences of 256 tokens")
@click.option("--only", multiple=True, help=f"make only this row; repeatable: {'; '.join(NAMES)}")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="CPU threads")
def main(
    teacher: Path,
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    out: Path,
    steps: int | None,
    seeds: int,
    sequences: int,
    only: tuple[str, ...],
    threads: int,
) -> None:
    """Make and score everything that is not there yet, then write the table of all that is."""
    if unknown := set(only) - set(NAMES):
        raise UsageError(f"--only {unknown.pop()!r} is not known; expected one of: {'; '.join(NAMES)}")
    study = Study(teacher, list(data), list(held_out), out, steps, sequences, threads)
    rows: dict[str, list[dict[str, float]]] = {}
    for name in NAMES:
        make = study.run if not only or name in only or name in ("teacher", *ROUNDING) else None
        found = [study.kept(name, seed, make) for seed in range(1 if name in WITHOUT_SEED else seeds)]
        if entries := [entry for entry in found if entry is not None]:
            rows[name] = entries
    zeros = {name: _zero_ratios(study.folder(name, 0)) for name in rows if name in VARIANTS}
    table = make_table(rows)
    with atomic_write(out / "table.md") as file:
        file.write(table.encode())
    draw(zeros, out / "zero_ratio.png")
    click.echo(table)
    click.echo(json.dumps({name: [entry["bits_per_byte"] for entry in entries] for name, entries in rows.items()}))


def make_table(rows: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: mean and standard deviation over the seeds, recovery, zero ratio."""
    top = rows["round to nearest, group 256"][0]["bits_per_byte"]
    bottom = rows["teacher"][0]["bits_per_byte"]
    lines = ["| variant | seeds | bits per byte | recovery | zero ratio |", "|---|---|---|---|---|"]
    for name, entries in rows.items():
        scores = [entry["bits_per_byte"] for entry in entries]
        spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
        zero = "" if name == "teacher" else f"{mean(entry['zero_ratio'] for entry in entries):.3f}"
        recovery = (top - mean(scores)) / (top - bottom)
        lines.append(f"| {name} | {len(scores)} | {mean(scores):.4f}{spread} | {recovery:.0%} | {zero} |")
    return "\n".join(lines) + "\n"


def _zero_ratios(folder: Path) -> list[tuple[int, float]]:
    """(tokens, zero ratio) over a training."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(entry["tokens"], entry["zero_ratio"]) for entry in entries if "zero_ratio" in entry]


def draw(zeros: dict[str, list[tuple[int, float]]], out: Path) -> None:
    """Zero ratio over the tokens, one line a variant."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, points in zeros.items():
        axis.plot(*zip(*points, strict=True), label=name)
    axis.set(title="zero ratio, mean over the projections (first seed)", xlabel="tokens", ylim=(0, 1))
    if zeros:
        axis.legend(fontsize="small")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    run_command(main, "scripts/studies/qat_variants.py")
