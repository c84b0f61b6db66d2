"""What happens between the steps. The loop enters every hook before the first step and calls it after each.

Hooks run on every process in the order of the list, and all processes have the same list: what only the main one does
(files, bar, evaluation) asks for itself. A hook with `votes` is asked before a step's update whether it wants to stop;
the processes then agree, and its `stop` says how.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean
from types import FrameType
from typing import Any

import torch

from qat.errors import TrainingError
from qat.evaluate import score_document
from qat.quantizer import zero_ratios
from qat.train.run import Run
from qat.train.saving import save_state
from qat.train.scalars import tensorboard
from tmexport.cli.progress import progress_bar
from tmexport.documents import score_documents


@dataclass
class Training:
    """A training after some step: what hooks see, and what they may change.

    step: steps done. best: lowest held-out score so far. zeros: the zero ratio of every module when last looked at. entry: of
    metrics.jsonl, for this step. save: keep a checkpoint now. error: raised, and stopped_by: said, after this step.
    """

    run: Run
    step: int
    best: float
    optimizer_state: Callable[[], Mapping[str, Any]]  # whole; all processes must call it together
    zeros: dict[str, float] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    save: bool = False
    error: BaseException | None = None
    stopped_by: str | None = None

    @property
    def is_last(self) -> bool:
        return self.step == self.run.recipe.steps

    @property
    def is_main(self) -> bool:
        return self.run.accelerator.is_main_process

    def is_due(self, every: int) -> bool:
        """At every so many steps, and at the last."""
        return self.step % every == 0 or self.is_last


class Hook(contextlib.AbstractContextManager):
    """A hook that does nothing."""

    votes = False

    def __exit__(self, *_: object) -> None:
        return None

    def wants_to_stop(self) -> bool:
        """Asked on every process at each step, if it votes."""
        return False

    def stop(self, training: Training) -> None:
        """A process wanted to stop: say how, in `training`; on every process."""

    def reads_weights(self, training: Training) -> bool:
        """Whether the student must hold the whole weights of this step; the same on every process."""
        return False

    def after_step(self, training: Training) -> None:
        """After the update."""


class Interruption(Hook):
    """Ctrl-C: save after the step in progress, then stop. A second Ctrl-C interrupts at once."""

    votes = True

    def __enter__(self) -> Interruption:
        self.seen = False
        try:
            self._previous = signal.signal(signal.SIGINT, self._remember)
        except ValueError:  # not in the main thread: Ctrl-C goes elsewhere
            self._previous = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, self._previous)

    def wants_to_stop(self) -> bool:
        return self.seen

    def stop(self, training: Training) -> None:
        training.save, training.error = True, KeyboardInterrupt()


class TimeLimit(Hook):
    """Save and stop after so many minutes; 0 = never."""

    votes = True

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes

    def __enter__(self) -> TimeLimit:
        self._started = time.monotonic()
        return self

    def wants_to_stop(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._started > self._seconds

    def stop(self, training: Training) -> None:
        training.save = True
        if not training.is_last:
            training.stopped_by = "minutes"


class ZeroRatios(Hook):
    """Counts the zero codes of every module, and stops a training in which one collapses."""

    def reads_weights(self, training: Training) -> bool:
        return training.is_due(training.run.recipe.log_every)

    def after_step(self, training: Training) -> None:
        if not self.reads_weights(training):
            return
        before, now, recipe = training.zeros, zero_ratios(training.run.student), training.run.recipe
        training.zeros = now
        training.entry |= {"zero_ratio": mean(now.values()), "zero_ratios": now} if now else {}
        collapsed = find_collapse(before, now, recipe.collapse_ratio)
        if collapsed and not recipe.allow_collapse:
            training.save = True
            training.error = TrainingError(
                f"step {training.step}: the zero ratio of {collapsed}; saved in {training.run.latest}; "
                "--resume --allow-collapse goes on"
            )


def find_collapse(before: Mapping[str, float], now: Mapping[str, float], limit: float) -> str | None:
    """The module whose zero ratio is above `limit` and rose since the last look, in words; None if there is none."""
    for name, ratio in now.items():
        if ratio > limit and ratio > before.get(name, 1.0):
            return f"{name} collapsed: {before[name]:.1%} -> {ratio:.1%}, above {limit:.0%} and rising"
    return None


class Evaluation(Hook):
    """Bits per byte of the student on the held-out documents; the best weights are kept."""

    def reads_weights(self, training: Training) -> bool:
        return training.is_due(training.run.recipe.eval_every)

    def after_step(self, training: Training) -> None:
        run = training.run
        if not run.held_out or not training.is_main or not self.reads_weights(training):
            return
        # Not compiled: each length would be, and without a gradient torch 2.13's code of the scan is wrong in bf16 (docs/log.md).
        with torch.compiler.set_stance("force_eager"):
            score = score_documents(run.held_out, partial(score_document, run.student)).bits_per_byte
        training.entry["held_out_bits_per_byte"] = score
        if score < training.best:
            training.best = score
            save_state(run.best, run.student, None, training.step, score, run.recipe, run.inputs)


class Metrics(Hook):
    """metrics.jsonl: a line a step."""

    def __init__(self, run: Run) -> None:
        self._path = run.metrics

    def __enter__(self) -> Metrics:
        self._file = open(self._path, "a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def after_step(self, training: Training) -> None:
        self._file.write(json.dumps(training.entry) + "\n")
        self._file.flush()


class TensorBoard(Hook):
    """The same numbers for TensorBoard."""

    def __init__(self, run: Run) -> None:
        self._writer = tensorboard(run.folder / "tensorboard", run.metrics)

    def __enter__(self) -> TensorBoard:
        self._add = self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def after_step(self, training: Training) -> None:
        self._add(training.entry)


class ProgressBar(Hook):
    """Loss, score, speed and zeros on stderr."""

    def __init__(self, steps: int) -> None:
        self._context = progress_bar("training", steps, keep=True)

    def __enter__(self) -> ProgressBar:
        self._bar = self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def after_step(self, training: Training) -> None:
        entry = training.entry
        score = f"{entry['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in entry else "aligning layers"
        parts = [f"loss {entry['loss']:.3f}", score, f"{entry['tokens_per_second']:,.0f} tok/s"]
        if training.zeros:
            parts.append(f"{mean(training.zeros.values()):.0%} zeros")
        self._bar.update(training.step, " · ".join(parts))


class Checkpoints(Hook):
    """What --resume reads: every save_every steps, at the last, and where another hook asked for it. Must come last."""

    def reads_weights(self, training: Training) -> bool:
        return training.save or training.is_due(training.run.recipe.save_every)

    def after_step(self, training: Training) -> None:
        if not self.reads_weights(training):
            return
        run, state = training.run, training.optimizer_state()
        if training.is_main:
            save_state(run.latest, run.student, state, training.step, training.best, run.recipe, run.inputs)


def hooks_of(run: Run, more: Sequence[Hook] = ()) -> list[Hook]:
    """The hooks of a run in their order; `more` come before the checkpoint is saved."""
    hooks: list[Hook] = [Interruption(), TimeLimit(run.recipe.minutes), ZeroRatios(), Evaluation()]
    if run.accelerator.is_main_process:
        hooks.append(Metrics(run))
        if run.recipe.tensorboard:
            hooks.append(TensorBoard(run))
        hooks.append(ProgressBar(run.recipe.steps))
    return [*hooks, *more, Checkpoints()]
