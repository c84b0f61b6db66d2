"""What each step of the published post-training methods gives on a teacher, and on the same with outlier channels made by hand.

    python scripts/studies/ptq_ablation.py --teacher scripts/demo/teacher --data train.jsonl --heldout heldout.jsonl --out rows.json

Weights in blocks of 32, static 8-bit activation scales (`qat/ptq/static.py`) or none (W4A16; RTN of it is GGUF's Q4_0 by our rule).
Of every row the bits per byte, the KL to the teacher and how often both have the same first token, also by position. The outliers:
every 64th channel behind a norm times 30, its column of the matrix behind over 30, which is the same function. A table goes to
stderr; the last line is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import click
import numpy as np
import torch

from qat.evaluate import documents_in, find_tokenizer
from qat.model import LanguageModel, load_model
from qat.ptq.making import calibration_ids, make
from qat.ptq.static import make_static
from qat.ptq.statistics import gather
from qat.ptq.transforms import Work
from scripts.studies.rows import results
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.documents import Document
from tmexport.files import atomic_write

_PATH = click.Path(path_type=Path, exists=True)
_OUTLIER, _EVERY = 30.0, 64
_SEGMENT = 512  # tokens a forward pass of two models
EDGES = (0, 256, 1024, 4096, 1 << 30)  # positions in a document, in parts
TEACHERS = ("as trained", "with outliers")
FULL = "full precision"


class Step(NamedTuple):
    """How a row is made: scales of x and of B and C for a group (per_group) or clusters of x (clustered), with static activations."""

    method: str
    kind: str
    transforms: tuple[str, ...] = ()
    static: bool = True
    per_group: bool = False
    clustered: bool = False


STEPS = {
    "W8A8 RTN": Step("rtn", "int8"),
    "W4A8 RTN": Step("rtn", "int4"),
    "W4A8 + Hadamard": Step("rtn", "int4", ("hadamard",)),
    "W4A8 + GPTQ": Step("gptq", "int4", ("hadamard",)),
    "W4A8 + B and C a group": Step("gptq", "int4", ("hadamard",), per_group=True),
    "W4A8 + sort-and-cluster": Step("gptq", "int4", ("sort", "hadamard"), per_group=True, clustered=True),
    "W4A16 RTN": Step("rtn", "int4", static=False),
    "W4A16 GPTQ": Step("gptq", "int4", static=False),
    "W4A16 + Hadamard": Step("gptq", "int4", ("hadamard",), static=False),
    "W8A8 + Hadamard": Step("rtn", "int8", ("hadamard",)),
    "W8A8 KLT": Step("rtn", "int8", ("klt",)),
    "W8A8 + smooth": Step("rtn", "int8", ("smooth",)),
    "W8A8 + B and C a group": Step("rtn", "int8", ("hadamard",), per_group=True),
    "W8A8 + sort-and-cluster": Step("rtn", "int8", ("sort", "hadamard"), per_group=True, clustered=True),
    "W4A8 + smooth": Step("rtn", "int4", ("smooth",)),
    "W4A8 KLT": Step("rtn", "int4", ("klt",)),
    "W8A16 RTN": Step("rtn", "int8", static=False),
    "W8A8 RTN, online Hadamard": Step("rtn", "int8", ("online",)),
    "W8A8 + Hadamard, online Hadamard": Step("rtn", "int8", ("hadamard", "online")),
    "W4A8 + GPTQ, online Hadamard": Step("gptq", "int4", ("hadamard", "online")),
    "W4A16 + Hadamard, online Hadamard": Step("gptq", "int4", ("hadamard", "online"), static=False),
}


class Key(NamedTuple):
    """A row: a key of TEACHERS, the seed of the calibration text, a key of STEPS or FULL."""

    teacher: str
    seed: int
    name: str

    def __str__(self) -> str:
        return f"{self.teacher}, seed {self.seed}, {self.name}"


def keys(seeds: int) -> list[Key]:
    """All rows; those of one seed after those of the one before. What reads no calibration text has one seed."""
    unseeded = {FULL} | {
        n for n, step in STEPS.items() if not step.static and step.method == "rtn" and not step.transforms
    }
    return [
        Key(teacher, seed, name)
        for seed in range(seeds)
        for teacher in TEACHERS
        for name in (FULL, *STEPS)
        if seed == 0 or name not in unseeded
    ]


@dataclass(frozen=True)
class Study:
    """What all rows have in common. teachers: folders by the names in TEACHERS; ids: calibration tokens by seed; folder: for files."""

    teachers: Mapping[str, Path]
    ids: Mapping[int, torch.Tensor]
    heldout: tuple[Path, ...]
    folder: Path

    def row(self, key: Key) -> tuple[Key, dict[str, Any]]:
        """Make one and score it."""
        teacher = self.teachers[key.teacher]
        whole = load_model(self.teachers[TEACHERS[0]]).requires_grad_(False)
        documents = documents_in(self.heldout, find_tokenizer(teacher, None), whole.config)
        if key.name == FULL:
            return key, score(load_model(teacher).requires_grad_(False), whole, documents) | {"bytes": None}
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            model, size = self.made(STEPS[key.name], teacher, key.seed, Path(folder) / "made")
            return key, score(model, whole, documents) | {"bytes": size}

    def made(self, step: Step, teacher: Path, seed: int, out: Path) -> tuple[LanguageModel, int]:
        """The model of one step, and the bytes of its weights."""
        ids = self.ids[seed]
        made = make(step.method, teacher, out, step.kind, None, ids, "int8", transforms=step.transforms, seed=seed)
        model = load_model(out).requires_grad_(False)
        if step.static:
            clusters = next((done["clusters"] for done in made.transforms if done["name"] == "sort"), None)
            found = gather(model, ids, moments=False)
            make_static(model, found, step.per_group, clusters if step.clustered else None)
        return model, sum(tensor.n_bytes for tensor in open_checkpoint(out).stored.values())


def with_outliers(teacher: Path, folder: Path) -> Path:
    """The same function with channels of 30 times their size behind the norms."""
    checkpoint = open_checkpoint(teacher)
    work = Work.of(checkpoint)
    for block in range(len(work.config.blocks)):
        for norm, readers in (("norm", work.readers(block)), ("gate_norm", work.named("out_proj", block=block))):
            work.tensors[work.named(norm, block=block)[0].hf].reshape(-1)[::_EVERY] *= _OUTLIER
            for tensor in readers:
                work.tensors[tensor.hf][:, ::_EVERY] /= _OUTLIER
    write_checkpoint(folder, work.config, work.rounded(), checkpoint.tokenizer)
    return folder


@torch.no_grad()
def score(model: LanguageModel, teacher: LanguageModel, documents: Sequence[Document]) -> dict[str, Any]:
    """Bits per byte, KL(teacher || model) in nats a token, share of equal first tokens; bits a token by position."""
    found = [per_token(model, teacher, document.ids) for document in documents if document.scored]
    nats, kl, same = (np.concatenate(parts) for parts in zip(*found, strict=True))
    places = np.concatenate([np.arange(len(parts[0])) for parts in found])
    bits = nats / math.log(2)
    return {
        "bits_per_byte": float(bits.sum() / sum(document.n_bytes for document in documents if document.scored)),
        "kl": float(kl.mean()),
        "top1": float(same.mean()),
        "by_position": {
            str(low): float(bits[(places >= low) & (places < high)].mean())
            for low, high in itertools.pairwise(EDGES)
            if (places >= low).any()
        },
    }


def per_token(model: LanguageModel, teacher: LanguageModel, ids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of ids[1:]: the model's nats, KL(teacher || model), whether both have the same first token."""
    found: list[tuple[np.ndarray, ...]] = []
    states, known = model.fresh_states(), teacher.fresh_states()
    for start in range(0, len(ids) - 1, _SEGMENT):
        part = torch.from_numpy(ids[start : start + _SEGMENT + 1].astype(np.int64))[None]
        log_p, log_q = (
            torch.log_softmax(own.hidden(part[:, :-1], state)[0] @ own.head_weight.t(), -1)
            for own, state in ((model, states), (teacher, known))
        )
        nats = -log_p.gather(1, part[0, 1:, None])[:, 0]
        kl = (log_q.exp() * (log_q - log_p)).sum(1)
        found.append((nats.double().numpy(), kl.double().numpy(), (log_p.argmax(1) == log_q.argmax(1)).numpy()))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def table(rows: Mapping[str, Mapping[str, Any]], seeds: int) -> Iterator[str]:
    """Lines of markdown: every step on every teacher, means over the seeds that there are."""
    yield "| teacher | | seeds | bits per byte | above full precision | KL | same first token | MB |"
    yield "|---|---|---|---|---|---|---|---|"
    for teacher in TEACHERS:
        whole = rows.get(str(Key(teacher, 0, FULL)), {}).get("bits_per_byte", math.nan)
        for name in (FULL, *STEPS):
            found = [rows[key] for seed in range(seeds) if (key := str(Key(teacher, seed, name))) in rows]
            if not found:
                continue
            scores = [row["bits_per_byte"] for row in found]
            spread = f" ± {stdev(scores):.4f}" if len(scores) > 1 else ""
            size = "" if found[0]["bytes"] is None else f"{found[0]['bytes'] / 1e6:.2f}"
            kl, top1 = mean(row["kl"] for row in found), mean(row["top1"] for row in found)
            yield (
                f"| {teacher} | {name} | {len(scores)} | {mean(scores):.4f}{spread} | {mean(scores) / whole - 1:+.2%} | "
                f"{kl:.4f} | {top1:.1%} | {size} |"
            )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--teacher", required=True, type=_PATH, help="Checkpoint folder.")
@click.option("--data", multiple=True, required=True, type=_PATH, help="Calibration text; repeatable.")
@click.option("--heldout", multiple=True, required=True, type=_PATH, help="Text to score; repeatable.")
@click.option("--samples", default=32, show_default=True, help="Calibration sequences of 512 tokens.")
@click.option("--seeds", default=1, show_default=True, help="Calibration texts a row.")
@click.option("-t", "--threads", default=2, show_default=True, help="With one job.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Rows at a time.")
@click.option("--minutes", type=float, help="Give up what has not finished by then.")
@click.option("--most", type=click.IntRange(min=0), help="End after so many rows, to go on another time.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Results, JSON; rows that it has are not run again."
)
def main(
    teacher: Path, data: tuple[Path, ...], heldout: tuple[Path, ...], samples: int, seeds: int, threads: int,
    jobs: int, minutes: float | None, most: int | None, out: Path,
) -> None:  # fmt: skip
    """Measure every step on both teachers."""
    torch.set_num_threads(threads)
    rows: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.exists() else {}
    wanted = keys(seeds)
    left = [key for key in wanted if str(key) not in rows][:most]
    with tempfile.TemporaryDirectory() as folder, progress_bar("rows", len(left), keep=True) as bar:
        texts = [calibration_ids(teacher, list(data), None, samples, 512, seed, Path(folder)) for seed in range(seeds)]
        teachers = dict(zip(TEACHERS, (teacher, with_outliers(teacher, Path(folder) / "outliers")), strict=True))
        study = Study(teachers, dict(enumerate(texts)), heldout, Path(folder))
        for key, row in results(study.row, left, jobs, minutes):
            rows[str(key)] = row
            with atomic_write(out) as file:
                file.write(json.dumps(rows).encode())
            bar.advance(1, what=f"{key} {row['bits_per_byte']:.4f}")
    click.echo("\n".join(table(rows, seeds)), err=True)
    click.echo(json.dumps({"rows": rows, "left": sum(str(key) not in rows for key in wanted)}))


if __name__ == "__main__":
    run_command(main, "scripts/studies/ptq_ablation.py")
