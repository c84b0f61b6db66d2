"""Does the error of a ternary model grow along the sequence? State and output against the teacher's, by position.

    python scripts/studies/error_by_position.py --teacher out/teacher --student out/rtn --student out/student \
        --data heldout.jsonl --out errors.png

At every 32nd position: the relative error of each layer's SSM state, ||student - teacher|| / ||teacher||, and the mean
KL(teacher || student) of the 32 predictions before it, averaged over documents. The last line is one JSON object.
"""

from __future__ import annotations

import io
import json
from itertools import chain
from pathlib import Path

import click
import numpy as np
import torch

from qat.evaluate import documents_in, find_tokenizer
from qat.losses import distillation_loss
from qat.model import LanguageModel, load_model
from tmexport.cli.app import run_command
from tmexport.files import atomic_write

_PATH = click.Path(path_type=Path)
_STRIDE = 32


@click.command()
@click.option("--teacher", required=True, type=_PATH, help="checkpoint folder")
@click.option("--student", "students", multiple=True, required=True, type=_PATH, help="ternary checkpoint; repeatable")
@click.option("--data", multiple=True, required=True, type=_PATH, help="text; its documents are read from their start")
@click.option("--length", default=2048, show_default=True, help="positions; shorter documents are left out")
@click.option("--out", required=True, type=_PATH, help="PNG to write")
@click.option("--threads", default=2, show_default=True, help="CPU threads")
def main(
    teacher: Path, students: tuple[Path, ...], data: tuple[Path, ...], length: int, out: Path, threads: int
) -> None:
    """Measure and plot."""
    torch.set_num_threads(threads)
    reference = load_model(teacher)
    found = documents_in(data, find_tokenizer(teacher, None), reference.config)
    documents = [document.ids[: length + 1] for document in found if len(document.ids) > length]
    if not documents:
        raise click.ClickException(f"no document has {length} tokens; use a smaller --length")
    ids = torch.from_numpy(np.stack(documents).astype(np.int64))
    results = {student.name: errors(reference, load_model(student), ids) for student in students}
    draw(results, out)
    summary = {
        name: {
            "kl_first_half": float(kl[: len(kl) // 2].mean()),
            "kl_second_half": float(kl[len(kl) // 2 :].mean()),
            "state_error_first": [round(float(v), 4) for v in state[0]],
            "state_error_last": [round(float(v), 4) for v in state[-1]],
        }
        for name, (state, kl) in results.items()
    }
    click.echo(json.dumps({"documents": len(documents), "positions": length, "students": summary, "plot": str(out)}))


@torch.no_grad()
def errors(teacher: LanguageModel, student: LanguageModel, ids: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(relative error of the state [steps, layers], KL [steps]), one step every 32 positions of ids [documents, n + 1]."""
    ours, theirs = student.fresh_states(), teacher.fresh_states()
    states, divergences = [], []
    for start in range(0, ids.shape[1] - _STRIDE, _STRIDE):
        part, targets = ids[:, start : start + _STRIDE], ids[:, start + 1 : start + _STRIDE + 1]
        known, hidden = teacher.backbone(part, theirs), student.backbone(part, ours)
        loss = distillation_loss(hidden, student.head_weight, targets, known, teacher.head_weight, 1.0)
        divergences.append(loss.kl.item())
        pairs = zip(chain.from_iterable(ours), chain.from_iterable(theirs), strict=True)
        states.append([((a.ssm - b.ssm).norm() / b.ssm.norm()).item() for a, b in pairs])
    return np.array(states), np.array(divergences)


def draw(results: dict[str, tuple[np.ndarray, np.ndarray]], out: Path) -> None:
    """State error (mean over layers) and KL over the position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, (state, kl) in results.items():
        positions = _STRIDE * np.arange(1, len(kl) + 1)
        axes[0].plot(positions, state.mean(1), label=name)
        axes[1].plot(positions, kl, label=name)
    axes[0].set(title="relative error of the SSM state, mean over layers", xlabel="position", ylim=(0, None))
    axes[1].set(title="KL(teacher || student), nats a token", xlabel="position", ylim=(0, None))
    axes[1].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with atomic_write(out) as file:
        file.write(buffer.getbuffer())


if __name__ == "__main__":
    run_command(main, "scripts/studies/error_by_position.py")
