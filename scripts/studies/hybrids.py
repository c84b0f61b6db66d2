"""Is a small hybrid worth it, and does it stay so when ternary? Against Mamba-2 alone and attention alone, equal in parameters and tokens.

    python scripts/studies/hybrids.py --out study --minutes 4     # start it again until it says that all is done

Each model is trained from nothing on the demo's corpus, rounded to ternary, and trained on as a ternary student of itself. All of it
takes about 12 minutes of one core; what is done is kept in OUT, and a second start goes on where the first stopped. Bits per
byte are of the first 1,024 tokens of each held-out speech, read in windows of the training length, 256 (`window`), and in one piece
(`long`), of which attention was never trained on the later positions. recovered = (rounded - ternary) / (rounded - full), by
windows. Writes OUT/table.md; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from qat.evaluate import documents_in, score_document
from qat.model import LanguageModel, load_model
from qat.ptq.making import make
from qat.recipe import Recipe
from qat.train.training import first_tokens, train
from runtime_ref.arithmetic import preset_of
from runtime_ref.bench.measure import time_decode, time_prefill
from runtime_ref.model import Model as Runtime
from runtime_ref.state import state_arrays, with_positions
from scripts.demo.make_corpus import read_corpus, write_split
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.documents import score_documents
from tmexport.files import atomic_write
from tmexport.gguf.export import plan_export
from tmexport.model import Block, Branch, Model, llama_model, mamba2_model
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.branches.mlp import SwiGLU

D_MODEL, WINDOW, LONG, CONTEXTS, VOCABULARY = 256, 256, 1024, (1024, 16384), 4096
TOKENIZER = Path(__file__).resolve().parents[1] / "demo" / "teacher" / "tokenizer.json"


def hybrid() -> Model:
    """4 layers, Mamba-2, Mamba-2, attention without positions, Mamba-2, each with a SwiGLU: as Granite-4.0-H is built."""
    mamba = Mamba2(D_MODEL, 2 * D_MODEL, d_state=64)
    attention = Attention(D_MODEL, 4, 2, 64, 0.125, rope_theta=None)
    mlp = SwiGLU(D_MODEL, 512)
    mixers: list[Branch] = [mamba, mamba, attention, mamba]
    blocks = tuple(Block((branch,)) for mixer in mixers for branch in (mixer, mlp))
    return Model(D_MODEL, VOCABULARY, blocks, family="granitehybrid")


SHAPES: dict[str, Callable[[], Model]] = {
    "hybrid": hybrid,
    "mamba2": partial(mamba2_model, d_model=D_MODEL, n_layer=7, vocab_size=VOCABULARY, d_state=64),
    "attention": partial(
        llama_model, D_MODEL, 4, VOCABULARY, n_heads=4, n_kv_heads=2, d_ff=768, tie_embeddings=True, rms_eps=1e-5
    ),
}
STAGES = ("full", "rounded", "ternary")


class OutOfTime(Exception):
    """The minutes of this start are over."""


class Study:
    """One folder of runs: OUT/<shape>-<stage>, what was measured of each in OUT/<shape>-<stage>.json."""

    def __init__(self, out: Path, steps: int, ternary_steps: int, minutes: float, threads: int) -> None:
        self.out, self.threads = out, threads
        self._steps = {"full": steps, "ternary": ternary_steps}
        self._until = time.monotonic() + 60 * minutes if minutes else None
        self.train_text, self.held_out = out / "train.jsonl", out / "heldout.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        if not self.held_out.is_file():
            write_split(read_corpus(), self.train_text, self.held_out)

    def minutes(self) -> float:
        """What is left of this start; 0 without a limit.

        Raises:
            OutOfTime: nothing is.
        """
        if self._until is None:
            return 0.0
        left = (self._until - time.monotonic()) / 60
        if left <= 0.05:
            raise OutOfTime
        return left

    def folder(self, shape: str, stage: str) -> Path:
        return self.out / f"{shape}-{stage}"

    def recipe(self, stage: str) -> Recipe:
        """The demo's settings; the same for every shape."""
        common: dict[str, Any] = {"seq_len": WINDOW, "batch_size": 4, "save_every": 100, "eval_every": 10**6}
        own: dict[str, Any] = {"lr": 3e-3, "warmup": 0.03, "weight_decay": 0.1}
        if stage == "ternary":
            own = {"lr": 1e-3, "warmup": 0.1, "weight_decay": 0.0, "kd_weight": 0.9}
        return Recipe(steps=self._steps[stage], threads=self.threads, minutes=self.minutes(), **common, **own)

    def make(self, shape: str, stage: str) -> float:
        """Train or round one model; the minutes of CPU it took, those of earlier starts included.

        Raises:
            OutOfTime: it is not finished.
        """
        folder, started = self.folder(shape, stage), time.process_time()
        spent = folder.with_suffix(".minutes")
        before = float(spent.read_text()) if spent.is_file() else 0.0
        full = self.folder(shape, "full")
        if stage == "rounded":
            make("rtn", full, folder)
            return (time.process_time() - started) / 60
        teacher, model = (None, SHAPES[shape]()) if stage == "full" else (full, None)
        tokenizer = TOKENIZER if stage == "full" else None
        recipe, cache = self.recipe(stage), self.out / "cache"
        done = train(recipe, [self.train_text], folder, teacher, None, tokenizer, resume=True, cache=cache, shape=model)
        minutes = before + (time.process_time() - started) / 60
        spent.write_text(str(minutes))
        if done["steps"] < recipe.steps:
            raise OutOfTime
        return minutes

    def bits(self, model: LanguageModel) -> dict[str, float]:
        """Bits per byte of the held-out text, in windows and in one piece."""
        whole = documents_in([self.held_out], TOKENIZER, model.config)
        documents = first_tokens(whole, LONG * len(whole), TOKENIZER)

        def in_windows(ids: np.ndarray) -> float:
            return sum(score_document(model, ids[at : at + WINDOW + 1]) for at in range(0, len(ids) - 1, WINDOW))

        return {
            "window": score_documents(documents, in_windows).bits_per_byte,
            "long": score_documents(documents, partial(score_document, model)).bits_per_byte,
        }

    def row(self, shape: str, stage: str) -> dict[str, Any]:
        """What is known of one model: made, scored and exported now, if it was not before.

        Raises:
            OutOfTime: it is not finished.
        """
        kept = self.folder(shape, stage).with_suffix(".json")
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        minutes, started = self.make(shape, stage), time.process_time()
        torch.set_num_threads(self.threads)
        checkpoint = open_checkpoint(self.folder(shape, stage))
        row: dict[str, Any] = {"bits": self.bits(load_model(checkpoint.path))}
        row["parameters"] = sum(int(np.prod(tensor.shape)) for tensor in checkpoint.config.tensors.values())
        kinds = {"full": ("f16", "f16"), "rounded": ("auto", "q8_0"), "ternary": ("auto", "q8_0")}[stage]
        row["file"] = plan_export(checkpoint, *kinds).write(kept.with_suffix(".gguf"), lambda tensor: None)
        row["cpu_minutes"] = minutes + (time.process_time() - started) / 60
        with atomic_write(kept) as file:
            file.write(json.dumps(row).encode())
        return row

    def speed(self, repeats: int) -> dict[str, dict[str, float]]:
        """Tokens a second of the ternary files by shape, one thread, preset fast: the median of rounds that alternate."""
        models = {name: Runtime.load(self.out / f"{name}-ternary.gguf", "fast", 1) for name in SHAPES}
        rates: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in SHAPES}
        for turn in range(repeats + 1):
            for name, model in models.items():
                found = time_prefill(model, 512, 1).best, time_decode(model, 64, 1, 1.0).best
                if turn:  # the first round warms up
                    for what, rate in zip(("prefill", "decode"), found, strict=True):
                        rates[name][what].append(rate)
        return {name: {what: float(np.median(r)) for what, r in by.items()} for name, by in rates.items()}


def state_bytes(shape: str, positions: int) -> int:
    """Of one sequence in preset fast."""
    arrays = state_arrays(SHAPES[shape](), preset_of("fast"))
    return sum(array._replace(shape=with_positions(array, positions)).nbytes for array in arrays)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ("model", "parameters", "full: window / long", "rounded", "ternary: window / long", "recovered", "file",
            *(f"state at {context:,}" for context in CONTEXTS), "prefill / decode")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        full, rounded, ternary = (row[stage]["bits"] for stage in STAGES)
        cells = [name, f"{row['full']['parameters'] / 1e6:.2f}M", f"{full['window']:.4f} / {full['long']:.4f}",
                 f"{rounded['window']:.4f}", f"{ternary['window']:.4f} / {ternary['long']:.4f}", f"{row['recovered']:.0%}",
                 f"{row['ternary']['file'] / 1e6:.2f} MB", *(f"{size / 1e3:,.0f} kB" for size in row["state"].values()),
                 f"{row['speed']['prefill']:,.0f} / {row['speed']['decode']:,.0f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="folder for all runs")
@click.option("--steps", type=click.IntRange(1), default=300, show_default=True, help="of 1,024 tokens, from nothing")
@click.option("--ternary-steps", type=click.IntRange(1), default=80, show_default=True, help="of every student")
@click.option("--minutes", type=click.FloatRange(0), default=0.0, help="stop after this time; 0 = when all is done")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="of the timing")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads of training")
def main(out: Path, steps: int, ternary_steps: int, minutes: float, repeats: int, threads: int) -> None:
    """Train, round, score and time every shape."""
    study = Study(out, steps, ternary_steps, minutes, threads)
    rows: dict[str, dict[str, Any]] = {}
    with progress_bar("hybrids", len(SHAPES) * len(STAGES), keep=True) as bar:
        try:
            for shape in SHAPES:
                rows[shape] = {}
                for stage in STAGES:
                    bar.advance(0, f"{shape}, {stage}")
                    rows[shape][stage] = study.row(shape, stage)
                    bar.advance()
        except OutOfTime:
            click.echo("not finished; start it again", err=True)
            click.echo(json.dumps({"done": False, "rows": rows}))
            return
    speeds = study.speed(repeats)
    for shape, row in rows.items():
        full, rounded, ternary = (row[stage]["bits"]["window"] for stage in STAGES)
        row["recovered"] = (rounded - ternary) / (rounded - full)
        row["state"] = {str(context): state_bytes(shape, context) for context in CONTEXTS}
        row["speed"] = speeds[shape]
    with atomic_write(out / "table.md") as file:
        file.write(table(rows).encode())
    cpu = sum(row[stage]["cpu_minutes"] for row in rows.values() for stage in STAGES)
    click.echo(json.dumps({"done": True, "cpu_minutes": cpu, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "scripts/studies/hybrids.py")
