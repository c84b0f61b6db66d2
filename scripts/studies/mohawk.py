"""The study behind docs/mohawk.md: which stages and which start make a small Transformer's hybrid good, at the same tokens.

    python scripts/studies/mohawk.py --data train.jsonl --held-out heldout.jsonl --out study --seeds 3

Trains a small Transformer (3.1M parameters; kept as OUT/teacher.pt, which is all that another machine needs), then every row: no attention kept or one layer in four, mixers started at random or from the attention,
stage 3 (distill) alone, 2 + 3 (align first) or 1 + 2 + 3 (orient before). Each row sees `--steps` steps in all. What is done is kept in
OUT and a second start goes on where the first stopped. Writes OUT/table.md, OUT/mohawk.png and, last on stdout, one JSON object.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch

from qat.convert.fitting import fit_layers
from qat.convert.making import started, untrained
from qat.data import Batches, TokenStream, tokenize_files
from qat.evaluate import documents_in, score_document
from qat.memory import keep_freed_memory
from qat.model import LanguageModel
from qat.recipe import Recipe
from qat.tokenizer import train_tokenizer
from qat.train.loop import fit
from qat.train.run import Run
from qat.train.stages import DEFAULTS
from qat.train.training import first_tokens
from scripts.studies.rows import results
from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.documents import Document, score_documents
from tmexport.files import atomic_write
from tmexport.model import llama_model

SHAPE: dict[str, Any] = {"d_model": 256, "n_layer": 4, "n_heads": 4, "d_ff": 512}
VOCABULARY, SEQUENCE, BATCH, CALIBRATION = 2048, 256, 4, 32
PLANS = {
    "3": {"distill": 1.0},
    "2 + 3": {"align": 0.4, "distill": 0.6},
    "1 + 2 + 3": {"orient": 0.1, "align": 0.4, "distill": 0.5},
}
KEPT = {"none": (), "1 in 4": (0,)}
STARTS = ("random", "copied")
_PATH = click.Path(path_type=Path)


@dataclass(frozen=True)
class Row:
    """One row of the table: keys of KEPT and PLANS, and one of STARTS."""

    kept: str
    start: str
    plan: str

    @property
    def slug(self) -> str:
        return f"{self.kept}-{self.start}-{self.plan}".replace(" ", "")


ROWS = [Row(kept, start, plan) for kept in KEPT for start in STARTS for plan in PLANS]


@dataclass(frozen=True)
class Study:
    """What all rows have in common."""

    data: list[Path]
    held_out: list[Path]
    out: Path
    teacher_steps: int
    steps: int
    threads: int

    @cached_property
    def tokenizer(self) -> Path:
        path = self.out / "tokenizer.json"
        return path if path.is_file() else train_tokenizer(self.data, VOCABULARY, path)

    @cached_property
    def stream(self) -> TokenStream:
        return tokenize_files(self.data, self.tokenizer, VOCABULARY, 0, self.out / "cache")

    @cached_property
    def documents(self) -> list[Document]:
        config = llama_model(vocab_size=VOCABULARY, eos_token_id=0, **SHAPE)
        return first_tokens(documents_in(self.held_out, self.tokenizer, config), 8192, self.tokenizer)

    @cached_property
    def teacher(self) -> LanguageModel:
        """The Transformer, its weights fp16 numbers; trained now if it is not there."""
        path = self.out / "teacher.pt"
        torch.manual_seed(0)
        model = LanguageModel(llama_model(vocab_size=VOCABULARY, eos_token_id=0, tie_embeddings=True, **SHAPE))
        if not path.is_file():
            every = max(1, self.teacher_steps // 4)
            recipe = Recipe(**self._settings(self.teacher_steps, 0) | {"lr": 3e-3, "eval_every": every})
            self.fit(recipe, model, None, "teacher")
            with atomic_write(path) as file:
                torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, file)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.requires_grad_(False).eval()

    @property
    def teacher_score(self) -> float:
        """Its bits per byte of the held-out text."""
        return score_documents(self.documents, partial(score_document, self.teacher)).bits_per_byte

    def _settings(self, steps: int, seed: int) -> dict[str, Any]:
        return {
            "steps": steps, "seq_len": SEQUENCE, "batch_size": BATCH, "lr": 2e-3, "warmup": 0.1, "seed": seed,
            "threads": self.threads, "eval_every": max(1, self.steps // 8), "save_every": 50,
        }  # fmt: skip

    def fit(
        self, recipe: Recipe, model: LanguageModel, teacher: LanguageModel | None, name: str
    ) -> list[dict[str, Any]]:
        """Train in OUT/name, or go on there; the steps that were evaluated."""
        batches = Batches(self.stream.tokens, recipe.seq_len, recipe.batch_size, recipe.seed)
        folder = self.out / name
        run = Run(recipe, model, teacher, batches, self.stream.bytes_per_token, folder, 0, self.tokenizer)
        run.held_out = self.documents
        fit(run, resume=True)
        lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "held_out_bits_per_byte" in line]

    def begin(self, row: Row, seed: int) -> LanguageModel:
        """The hybrid before its first step."""
        torch.manual_seed(seed + 1)
        kept = KEPT[row.kept]
        if row.start == "random":
            return untrained(self.teacher, kept).requires_grad_(True)
        batches = Batches(self.stream.tokens, SEQUENCE, CALIBRATION, seed + 1)
        ids = torch.from_numpy(batches(0)[:, :-1])
        hybrid = started(self.teacher, kept, ids)
        fit_layers(self.teacher, hybrid, ids)
        return hybrid.requires_grad_(True)

    def run(self, row: Row, seed: int) -> list[dict[str, float]]:
        """The curve of one row: tokens, bits per byte of the held-out text and, while it distils, the KL of that step."""
        keep_freed_memory()
        model, done = self.begin(row, seed), 0
        curve = []
        for stage, share in PLANS[row.plan].items():
            steps = round(share * self.steps)
            recipe = Recipe(**DEFAULTS[stage] | self._settings(steps, seed))
            for entry in self.fit(recipe, model, self.teacher, f"{row.slug}-{seed}/{stage}"):
                point = {"tokens": (done + entry["step"] + 1) * BATCH * SEQUENCE, "stage": stage}
                point["bits_per_byte"] = entry["held_out_bits_per_byte"]
                curve.append(point | ({"kl": entry["kl"]} if "kl" in entry else {}))
            done += steps
            model.requires_grad_(True)
        return curve

    def path(self, row: Row, seed: int) -> Path:
        """Where the curve of a row is kept."""
        return self.out / f"{row.slug}-{seed}.json"

    def make(self, key: tuple[Row, int]) -> tuple[Row, int]:
        """Train a row and keep its curve; its checkpoints go."""
        row, seed = key
        curve = self.run(row, seed)
        with atomic_write(self.path(row, seed)) as file:
            file.write(json.dumps(curve).encode())
        shutil.rmtree(self.out / f"{row.slug}-{seed}")
        return key


def table(curves: Mapping[Row, list[list[dict[str, Any]]]], teacher: float) -> Iterator[str]:
    """Lines of markdown."""
    yield "| attention kept | start | stages | seeds | bits per byte | above the teacher | KL |"
    yield "|---|---|---|---|---|---|---|"
    yield f"| all (the teacher) | | | 1 | {teacher:.4f} | | |"
    for row, found in curves.items():
        last = [curve[-1] for curve in found]
        scores = [point["bits_per_byte"] for point in last]
        spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
        kl = mean(point["kl"] for point in last)
        yield (
            f"| {row.kept} | {row.start} | {row.plan} | {len(scores)} | {mean(scores):.4f}{spread} | "
            f"{mean(scores) - teacher:+.4f} | {kl:.3f} |"
        )


def write_table(study: Study, keys: Sequence[tuple[Row, int]], teacher: float) -> dict[Row, list[list[dict[str, Any]]]]:
    """Write OUT/table.md; the curves that there are, by row."""
    curves: dict[Row, list[list[dict[str, Any]]]] = {}
    for row, seed in sorted(keys, key=lambda key: (ROWS.index(key[0]), key[1])):
        path = study.path(row, seed)
        if path.is_file():
            curves.setdefault(row, []).append(json.loads(path.read_text(encoding="utf-8")))
    with atomic_write(study.out / "table.md") as file:
        file.write(("\n".join(table(curves, teacher)) + "\n").encode())
    return curves


def draw(curves: Mapping[Row, list[list[dict[str, Any]]]], teacher: float, out: Path) -> None:
    """Bits per byte by tokens, a panel a number of kept layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(KEPT), figsize=(12, 4.5), layout="constrained", sharey=True)
    colours = dict(zip(PLANS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for axis, kept in zip(axes, KEPT, strict=True):
        for row, found in curves.items():
            if row.kept != kept:
                continue
            tokens = [point["tokens"] for point in found[0]]
            scores = [mean(curve[place]["bits_per_byte"] for curve in found) for place in range(len(tokens))]
            style = "-" if row.start == "copied" else "--"
            axis.plot(tokens, scores, style, color=colours[row.plan], label=f"{row.start}, stages {row.plan}")
        axis.axhline(teacher, color="black", lw=0.8)
        axis.set(title=f"attention kept: {kept}", xlabel="tokens", ylabel="bits per byte, held out")
        axis.set_ylim(teacher - 0.05, teacher + 0.3)  # what comes before is far above
        axis.legend(fontsize="x-small")
    figure.savefig(out, dpi=110)
    plt.close(figure)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", multiple=True, required=True, type=_PATH, help="Training text; repeatable.")
@click.option("--held-out", multiple=True, required=True, type=_PATH, help="Text to score; repeatable.")
@click.option("--out", required=True, type=_PATH, help="Folder for everything.")
@click.option("--teacher-steps", default=1200, show_default=True, help="Steps of 1,024 tokens of the Transformer.")
@click.option("--steps", default=200, show_default=True, help="Steps of every row, all stages together.")
@click.option("--seeds", default=1, show_default=True, help="Runs a row.")
@click.option("--report", is_flag=True, help="Only write the table and the plot of the rows that there are.")
@click.option("-t", "--threads", default=1, show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Rows at a time.")
@click.option("--minutes", type=float, help="Give up what has not finished by then.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole curves, not the last scores alone.")
def main(
    data: tuple[Path, ...], held_out: tuple[Path, ...], out: Path, teacher_steps: int, steps: int, seeds: int,
    report: bool, threads: int, jobs: int, minutes: float | None, as_json: bool,
) -> None:  # fmt: skip
    """The study of the stages of a hybrid, at small scale."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    study = Study(list(data), list(held_out), out, teacher_steps, steps, threads)
    wanted = [(row, seed) for seed in range(seeds) for row in ROWS]
    teacher = study.teacher_score  # before the rows: they find it, the tokenizer and the tokens in OUT
    left = [] if report else [key for key in wanted if not study.path(*key).is_file()]
    with progress_bar("rows", len(left), keep=True) as bar:
        for row, seed in results(replace(study).make, left, jobs, minutes):
            write_table(study, wanted, teacher)
            bar.advance(1, what=f"{row.slug}-{seed}")
    curves = write_table(study, wanted, teacher)
    if curves:
        draw(curves, teacher, out / "mohawk.png")
    click.echo((out / "table.md").read_text(encoding="utf-8"), err=True)
    said = {row.slug: found if as_json else [curve[-1] for curve in found] for row, found in curves.items()}
    click.echo(json.dumps({"teacher": teacher, "rows": said}))


if __name__ == "__main__":
    run_command(main, "python scripts/studies/mohawk.py")
