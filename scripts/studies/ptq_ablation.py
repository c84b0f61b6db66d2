"""What each step of the published post-training methods gives on a teacher, and on the same with outlier channels made by hand.

    python scripts/studies/ptq_ablation.py --teacher scripts/demo/teacher --data train.jsonl --heldout heldout.jsonl

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

_PATH = click.Path(path_type=Path, exists=True)
_OUTLIER, _EVERY = 30.0, 64

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
def main(
    teacher: Path, data: tuple[Path, ...], heldout: tuple[Path, ...], samples: int, seed: int, threads: int
) -> None:
    """Measure every step on both teachers."""
    torch.set_num_threads(threads)
    ids, scored, rows = read_ids(teacher, data, None, samples, 512, seed), list(heldout), {}
    with tempfile.TemporaryDirectory() as folder:
        teachers = {"as trained": teacher, "with outliers": with_outliers(teacher, Path(folder) / "outliers")}
        for which, source in teachers.items():
            rows[which] = {"full precision": {"bits_per_byte": evaluate(source, scored).bits_per_byte, "bytes": None}}
            for number, name in enumerate(STEPS):
                rows[which][name] = measure(name, source, Path(folder) / f"{which}-{number}", ids, scored)
                click.echo(f"{which:<14} {name:<26} {rows[which][name]['bits_per_byte']:.4f}", err=True)
    click.echo(json.dumps({"seed": seed, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "scripts/studies/ptq_ablation.py")
