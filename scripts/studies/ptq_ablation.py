"""What each step of the published post-training methods gives on a teacher, and on the same with outlier channels made by hand.

    python scripts/studies/ptq_ablation.py --teacher scripts/demo/teacher --data train.jsonl --heldout heldout.jsonl --out rows.json

Bits per byte with static 8-bit activation scales (`qat/ptq/static.py`) and weights in blocks of 32. The outliers: every 64th
channel behind a norm times 30, its column of the matrix behind over 30, which is the same function. The last line is one JSON object.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from qat.evaluate import evaluate
from qat.model import load_model
from qat.ptq.making import make
from qat.ptq.static import make_static
from qat.ptq.statistics import gather
from qat.ptq.text import read_ids
from qat.ptq.transforms import Work
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.files import atomic_write

_PATH = click.Path(path_type=Path, exists=True)
_OUTLIER, _EVERY = 30.0, 64
TEACHERS = ("as trained", "with outliers")

# name: method, kind of weights, transformations, scales for x and for B and C of a group, scales for clusters of x
STEPS: dict[str, tuple[str, str, tuple[str, ...], bool, bool]] = {
    "W8A8 RTN": ("rtn", "int8", (), False, False),
    "W8A8 + Hadamard": ("rtn", "int8", ("hadamard",), False, False),
    "W8A8 KLT": ("rtn", "int8", ("klt",), False, False),
    "W4A8 RTN": ("rtn", "int4", (), False, False),
    "W4A8 + smooth": ("rtn", "int4", ("smooth",), False, False),
    "W4A8 + Hadamard": ("rtn", "int4", ("hadamard",), False, False),
    "W4A8 + GPTQ": ("gptq", "int4", ("hadamard",), False, False),
    "W4A8 + B and C a group": ("gptq", "int4", ("hadamard",), True, False),
    "W4A8 + sort-and-cluster": ("gptq", "int4", ("sort", "hadamard"), True, True),
}


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


def measure(name: str, teacher: Path, folder: Path, ids: torch.Tensor, heldout: list[Path]) -> dict[str, Any]:
    """Bits per byte of one step, and the bytes of its weights."""
    method, kind, transforms, per_group, clustered = STEPS[name]
    made = make(method, teacher, folder, kind, None, ids, "int8", transforms=transforms)
    model = load_model(folder).requires_grad_(False)
    clusters = next((step["clusters"] for step in made.transforms if step["name"] == "sort"), None)
    make_static(model, gather(model, ids, moments=False), per_group, clusters if clustered else None)
    size = sum(tensor.n_bytes for tensor in open_checkpoint(folder).stored.values())
    return {"bits_per_byte": evaluate(folder, heldout, model=model).bits_per_byte, "bytes": size}


@click.command()
@click.option("--teacher", required=True, type=_PATH, help="checkpoint folder")
@click.option("--data", multiple=True, required=True, type=_PATH, help="calibration text")
@click.option("--heldout", multiple=True, required=True, type=_PATH, help="text to score")
@click.option("--samples", default=32, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="results, JSON; rows that it has are not run again"
)
@click.option("--most", type=click.IntRange(min=1), help="end after so many rows, to go on another time")
def main(
    teacher: Path,
    data: tuple[Path, ...],
    heldout: tuple[Path, ...],
    samples: int,
    seed: int,
    threads: int,
    out: Path,
    most: int | None,
) -> None:
    """Measure every step on both teachers."""
    torch.set_num_threads(threads)
    ids, scored = read_ids(teacher, data, None, samples, 512, seed), list(heldout)
    rows: dict[str, dict[str, Any]] = json.loads(out.read_text()) if out.exists() else {}
    wanted = [f"{which}, seed {seed}, {name}" for which in TEACHERS for name in ("full precision", *STEPS)]
    left = [key for key in wanted if key not in rows][:most]
    with tempfile.TemporaryDirectory() as folder, progress_bar("rows", len(left), keep=True) as bar:
        sources = {"as trained": teacher}
        for number, key in enumerate(left):
            which, _, name = key.split(", ", 2)
            if which not in sources:
                sources[which] = with_outliers(teacher, Path(folder) / "outliers")
            if name == "full precision":
                rows[key] = {"bits_per_byte": evaluate(sources[which], scored).bits_per_byte, "bytes": None}
            else:
                rows[key] = measure(name, sources[which], Path(folder) / str(number), ids, scored)
            with atomic_write(out) as file:
                file.write(json.dumps(rows).encode())
            bar.advance(1, what=f"{key} {rows[key]['bits_per_byte']:.4f}")
    click.echo(json.dumps({"rows": rows, "left": sum(key not in rows for key in wanted)}))


if __name__ == "__main__":
    run_command(main, "scripts/studies/ptq_ablation.py")
