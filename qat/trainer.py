"""The training loop: a pure function of its inputs, so that a run that was interrupted and resumed gives the same bits."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.data import Batches
from qat.errors import TrainingError
from qat.evaluate import documents_of, score_document
from qat.losses import Loss, distillation_loss
from qat.model import Mamba2LM
from qat.progress import Bar, progress_bar
from qat.quantizer import zero_ratios
from qat.recipe import Recipe, changed_settings
from tmexport.errors import UsageError
from tmexport.files import atomic_write


@dataclass
class Run:
    """Everything a training run needs. `held_out` is a stream of tokens, `held_out_bytes` the UTF-8 bytes of its text."""

    recipe: Recipe
    student: Mamba2LM
    teacher: Mamba2LM | None
    batches: Batches
    bytes_per_token: float
    folder: Path
    eos: int
    held_out: np.ndarray | None = None
    held_out_bytes: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def latest(self) -> Path:
        return self.folder / "checkpoints" / "latest.pt"

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.pt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"


class Step(nn.Module):
    """ids [batch, seq_len + 1] -> the loss of the student on them. The teacher is not part of its parameters."""

    def __init__(self, student: Mamba2LM, teacher: Mamba2LM | None, recipe: Recipe) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple: not a submodule
        self.recipe = recipe

    def forward(self, ids: Tensor) -> Loss:
        inputs, targets = ids[:, :-1], ids[:, 1:]
        teacher, recipe = self._teacher[0], self.recipe
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            known = None
            if teacher is not None and recipe.kd_weight > 0:
                with torch.no_grad():
                    known = teacher.backbone(inputs)
            return distillation_loss(
                self.student.backbone(inputs),
                self.student.head_weight,
                targets,
                known,
                teacher.head_weight if teacher is not None else None,
                recipe.kd_weight if known is not None else 0.0,
                recipe.temperature,
            )


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; decay on matrices only, never on norms, convolutions, biases, A, D or dt."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def fit(run: Run, resume: bool) -> dict[str, Any]:
    """Train; returns a summary. The student is left with the weights of the last step.

    Raises:
        TrainingError: the loss is not finite; the last checkpoint stays as it was.
        UsageError: the folder holds another run, or a checkpoint of other settings.
        KeyboardInterrupt: after saving.
    """
    recipe, device = run.recipe, run.device
    step_module = Step(run.student.to(device), run.teacher.to(device) if run.teacher else None, recipe)
    optimizer = make_optimizer(run.student, recipe)
    start, best = _begin(run, optimizer, resume)
    started, seconds = time.monotonic(), 0.0
    parameters = [p for p in run.student.parameters() if p.requires_grad]
    zeros: dict[str, float] = {}
    step, stopped_by = start, "steps"
    run.folder.joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
    _trim_metrics(run.metrics, start)
    with (
        run.metrics.open("a", encoding="utf-8") as log,
        progress_bar("training", recipe.steps) as bar,
        _catch_interrupt() as interrupted,
    ):
        while step < recipe.steps:
            began = time.monotonic()
            rate = recipe.learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = step_module(torch.from_numpy(run.batches(step)).to(device))
            entry = {"step": step, "tokens": (step + 1) * recipe.tokens_per_step, "lr": rate}
            entry |= {"loss": loss.total.item(), "cross_entropy": loss.cross_entropy.item(), "kl": loss.kl.item()}
            _check_finite(run, step, entry["loss"])
            optimizer.zero_grad(set_to_none=True)
            loss.total.backward()
            norm = nn.utils.clip_grad_norm_(parameters, recipe.clip or math.inf, foreach=True)
            entry["grad_norm"] = norm.item()
            _check_finite(run, step, entry["grad_norm"])
            optimizer.step()
            step += 1
            entry["bits_per_byte"] = entry["cross_entropy"] / math.log(2) / run.bytes_per_token
            seconds = time.monotonic() - began
            entry["tokens_per_second"] = round(recipe.tokens_per_step / seconds, 1)
            last = step == recipe.steps
            if step % recipe.log_every == 0 or last:
                zeros = zero_ratios(run.student)
                if zeros:
                    entry["zero_ratio"] = sum(zeros.values()) / len(zeros)
                    entry["zero_ratios"] = zeros
            if run.held_out is not None and (step % recipe.eval_every == 0 or last):
                entry["held_out_bits_per_byte"] = score = held_out_score(run)
                if score < best:
                    best = score
                    _save(run.best, run.student, None, step, best, recipe)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            _show(bar, step, entry, zeros)
            out_of_time = recipe.minutes > 0 and time.monotonic() - started > 60 * recipe.minutes
            if step % recipe.save_every == 0 or last or out_of_time or interrupted:
                _save(run.latest, run.student, optimizer, step, best, recipe)
            if interrupted:
                raise KeyboardInterrupt
            if out_of_time and not last:
                stopped_by = "minutes"
                break
    return {
        "steps": step,
        "stopped_by": stopped_by,
        "tokens": step * recipe.tokens_per_step,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_bits_per_byte": None if best == math.inf else best,
        "zero_ratio": sum(zeros.values()) / len(zeros) if zeros else None,
    }


def held_out_score(run: Run) -> float:
    """Bits per byte of the student on the held-out stream."""
    assert run.held_out is not None
    nats = sum(score_document(run.student, ids) for ids in documents_of(run.held_out, run.eos))
    return nats / math.log(2) / run.held_out_bytes


def _begin(run: Run, optimizer: torch.optim.Optimizer, resume: bool) -> tuple[int, float]:
    """(first step, best score so far): zero and infinity, or what the checkpoint says, after loading it."""
    if not run.latest.is_file():
        return 0, math.inf
    if not resume:
        raise UsageError(f"{run.folder}: already holds a run; continue it with --resume, or choose another --out")
    try:
        saved = torch.load(run.latest, map_location=run.device, weights_only=True)
        changed = changed_settings(saved["recipe"], run.recipe)
        if changed:
            raise UsageError(
                f"{run.latest}: was made with {changed[0]} = {saved['recipe'].get(changed[0])!r}, now it is "
                f"{asdict(run.recipe)[changed[0]]!r}; resume with the same settings, or choose another --out"
            )
        run.student.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return saved["step"], saved["best"]
    except (RuntimeError, KeyError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"{run.latest}: is damaged or not a checkpoint of this model ({type(error).__name__}); choose another --out"
        ) from None


def _save(
    path: Path, student: Mamba2LM, optimizer: torch.optim.Optimizer | None, step: int, best: float, recipe: Recipe
) -> None:
    state = {"model": student.state_dict(), "step": step, "best": best, "recipe": asdict(recipe)}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def _trim_metrics(path: Path, start: int) -> None:
    """Drop the entries of steps that will be done again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:start]
        with atomic_write(path) as file:
            file.write("".join(lines).encode())


def _check_finite(run: Run, step: int, value: float) -> None:
    if not math.isfinite(value):
        kept = f"the last checkpoint is {run.latest}" if run.latest.is_file() else "no checkpoint was saved yet"
        raise TrainingError(f"step {step}: the loss or its gradient is {value}; lower --lr; {kept}")


def _show(bar: Bar, step: int, entry: dict[str, Any], zeros: dict[str, float]) -> None:
    parts = [
        f"loss {entry['loss']:.3f}",
        f"{entry['bits_per_byte']:.3f} bits/byte",
        f"{entry['tokens_per_second']:,.0f} tok/s",
    ]
    if zeros:
        parts.append(f"{sum(zeros.values()) / len(zeros):.0%} zeros")
    bar.update(step, " · ".join(parts))


@contextlib.contextmanager
def _catch_interrupt() -> Iterator[list[int]]:
    """A list that is no longer empty once Ctrl-C was pressed; a second Ctrl-C interrupts at once."""
    seen: list[int] = []

    def remember(number: int, _frame: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, previous)

    try:
        previous = signal.signal(signal.SIGINT, remember)
    except ValueError:  # not in the main thread: Ctrl-C goes elsewhere
        yield seen
        return
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, previous)
