"""The training loop: a pure function of its inputs, so that a run that was interrupted and resumed gives the same bits."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from qat.data import Batches
from qat.errors import TrainingError
from qat.evaluate import documents_of, score_document
from qat.losses import TopPredictions, alignment_loss, distillation_loss
from qat.model import LanguageModel
from qat.quantizer import zero_ratios
from qat.recipe import Recipe
from qat.saving import load_state, save_state, trim_metrics
from qat.scalars import tensorboard
from qat.sharding import shard, whole
from qat.teacher_cache import TeacherCache
from tmexport.cli.progress import Bar, progress_bar
from tmexport.errors import UsageError
from tmexport.files import atomic_write


@dataclass
class Run:
    """Everything a training run needs. `held_out` is a stream of tokens, `held_out_bytes` the UTF-8 bytes of its text."""

    recipe: Recipe
    student: LanguageModel
    teacher: LanguageModel | None
    batches: Batches
    bytes_per_token: float
    folder: Path
    eos: int
    tokenizer: Path
    teacher_cache: TeacherCache | None = None
    held_out: np.ndarray | None = None
    held_out_bytes: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)  # digests of what is read, by flag; see load_state
    accelerator: Accelerator = field(default_factory=Accelerator)

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
    """ids int64 [batch, seq_len + 1] -> (loss, cross-entropy, KL). The teacher is not part of its parameters.

    While `aligning`, the loss is that of each layer against the teacher's, and the other two are NaN.
    """

    def __init__(self, student: LanguageModel, teacher: LanguageModel | None, recipe: Recipe) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple: not a submodule
        self.recipe = recipe
        self.aligning = False

    def forward(self, ids: Tensor, *top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`top`: the fields of TopPredictions, if the teacher was asked before."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        teacher, recipe = self._teacher[0], self.recipe
        known = None
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            if self.aligning:
                assert teacher is not None
                embedded = teacher.backbone.embeddings(inputs).float()
                loss = alignment_loss(self.student.backbone.layers, teacher.backbone.layers, embedded)
                unknown = torch.full((), math.nan, device=ids.device)
                return loss, unknown, unknown
            if teacher is not None and recipe.kd_weight > 0 and not top:
                with torch.no_grad():
                    known = teacher.backbone(inputs)
            loss = distillation_loss(
                self.student.backbone(inputs),
                self.student.head_weight,
                targets,
                known,
                teacher.head_weight if teacher is not None else None,
                recipe.kd_weight if known is not None or top else 0.0,
                recipe.temperature,
                TopPredictions(*top) if top else None,
            )
        return loss.total, loss.cross_entropy, loss.kl


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; decay on matrices only, never on norms, convolutions, biases, A, D, dt or scales."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and not name.endswith(".scale")]
    others = [p for name, p in named if p.ndim != 2 or name.endswith(".scale")]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def fit(run: Run, resume: bool) -> dict[str, Any]:
    """Train; returns a summary. The student is left with the weights of the last step.

    Raises:
        TrainingError: the loss is not finite (the last checkpoint stays as it was), or the zero ratio collapsed (after
            saving).
        UsageError: the folder holds another run, or a checkpoint of other settings.
        KeyboardInterrupt: after saving.
    """
    recipe, accelerator = run.recipe, run.accelerator
    main, device = accelerator.is_main_process, accelerator.device
    share = _share_of_batch(recipe, accelerator.num_processes)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UsageError("accelerate is configured for FSDP; configure it for several devices alone, and give --shard")
    if run.teacher is not None:
        run.teacher.to(device)
    run.student.to(device)
    run.student.backbone.checkpoint_activations = recipe.checkpoint_activations
    trained = copy.deepcopy(run.student) if recipe.shard else run.student
    if recipe.compile:
        for layer in trained.backbone.layers:
            layer.compile()
    work = Step(trained, run.teacher, recipe)
    if recipe.shard:
        shard(work, trained.backbone.layers, device, accelerator.num_processes)
    optimizer = make_optimizer(trained, recipe)
    step, best = load_state(run.latest, trained, optimizer, recipe, run.inputs, resume)
    module, optimizer = (work if recipe.shard else accelerator.prepare(work)), accelerator.prepare(optimizer)
    if recipe.shard:
        run.student.load_state_dict(whole(trained.state_dict()))
    started, stopped_by = time.monotonic(), "steps"
    zeros: dict[str, float] = {}
    if main:
        run.latest.parent.mkdir(parents=True, exist_ok=True)
        trim_metrics(run.metrics, step)
        with atomic_write(run.folder / "recipe.toml") as file:  # not before: a run of other settings was refused
            file.write(recipe.to_toml("teacher" if run.teacher is None else "student").encode())
    accelerator.wait_for_everyone()
    with (
        open(run.metrics if main else os.devnull, "a", encoding="utf-8") as log,
        progress_bar("training", recipe.steps, keep=True, shown=main) as bar,
        _catch_interrupt() as interrupted,
        _scalars(run, main) as add_scalars,
    ):
        while step < recipe.steps:
            began = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step)
            first = accelerator.process_index * share
            ids = torch.from_numpy(run.batches(step)[first : first + share]).to(device)
            optimizer.zero_grad(set_to_none=True)
            work.aligning = step < recipe.align_steps
            inputs = [ids]
            if run.teacher_cache is not None and not work.aligning:
                top = run.teacher_cache(step, first, share)
                inputs += [top.ids.to(device), top.log_q.to(device), top.log_tail.to(device)]
            losses = _backward(accelerator, module, inputs, recipe.accumulate)
            norm = whole(accelerator.clip_grad_norm_(module.parameters(), recipe.clip or math.inf)).item()
            # Sums of every process's numbers: all must agree on when to stop.
            late = recipe.minutes > 0 and time.monotonic() - started > 60 * recipe.minutes
            flags = losses.new_tensor([float(bool(interrupted)), float(late)])
            loss, ce, kl, stop, late_share = accelerator.reduce(torch.cat([losses, flags]), "mean").tolist()
            _check_finite(run, step, loss, norm)
            optimizer.step()
            entry: dict[str, Any] = {"step": step, "tokens": (step + 1) * recipe.tokens_per_step}
            entry |= {"lr": recipe.learning_rate(step), "loss": loss, "grad_norm": norm}
            if not work.aligning:
                entry |= {"cross_entropy": ce, "kl": kl, "bits_per_byte": ce / math.log(2) / run.bytes_per_token}
            entry["tokens_per_second"] = round(recipe.tokens_per_step / (time.monotonic() - began), 1)
            step += 1
            last = step == recipe.steps
            collapsed = None
            look, ask = step % recipe.log_every == 0 or last, step % recipe.eval_every == 0 or last
            save = step % recipe.save_every == 0 or last or stop or late_share
            if recipe.shard and (look or ask or save):
                run.student.load_state_dict(whole(trained.state_dict()))
            if look:
                before, zeros = zeros, zero_ratios(run.student)
                entry |= {"zero_ratio": mean(zeros.values()), "zero_ratios": zeros} if zeros else {}
                collapsed = find_collapse(before, zeros, recipe.collapse_ratio)
            if main and run.held_out is not None and ask:
                entry["held_out_bits_per_byte"] = score = held_out_score(run)
                if score < best:
                    best = score
                    save_state(run.best, run.student, None, step, best, recipe, run.inputs)
            log.write(json.dumps(entry) + "\n")
            log.flush()
            add_scalars(entry)
            _show(bar, step, entry, zeros)
            collapsed = None if recipe.allow_collapse else collapsed
            if save or collapsed:
                state = whole(optimizer.state_dict())
                if main:
                    save_state(run.latest, run.student, state, step, best, recipe, run.inputs)
            if collapsed:
                raise TrainingError(
                    f"step {step}: the zero ratio of {collapsed}; saved in {run.latest}; "
                    "--resume --allow-collapse goes on"
                )
            if stop:
                raise KeyboardInterrupt
            if late_share and not last:
                stopped_by = "minutes"
                break
    return {
        "steps": step,
        "stopped_by": stopped_by,
        "processes": accelerator.num_processes,
        "tokens": step * recipe.tokens_per_step,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_bits_per_byte": None if best == math.inf else best,
        "zero_ratio": mean(zeros.values()) if zeros else None,
    }


def _scalars(run: Run, main: bool) -> contextlib.AbstractContextManager[Callable[[dict[str, Any]], None]]:
    """TensorBoard's writer where it is wanted, or a function that does nothing."""
    if run.recipe.tensorboard and main:
        return tensorboard(run.folder / "tensorboard", run.metrics)
    return contextlib.nullcontext(lambda entry: None)


def _share_of_batch(recipe: Recipe, processes: int) -> int:
    """Sequences a process computes for each step."""
    if recipe.batch_size % (processes * recipe.accumulate):
        raise UsageError(
            f"a batch of {recipe.batch_size} cannot be shared by {processes} processes in {recipe.accumulate} parts each; "
            "choose a --batch-size that divides"
        )
    if recipe.align_steps and processes > 1:
        raise UsageError(
            "align_steps trains only the layers, which needs one process; use --align-steps 0 with several"
        )
    if recipe.shard and processes == 1:
        raise UsageError(
            "--shard needs several processes; start them with: torchrun --nproc-per-node N -m qat.train ..."
        )
    return recipe.batch_size // processes


def _backward(accelerator: Accelerator, module: nn.Module, inputs: Sequence[Tensor], count: int) -> Tensor:
    """Accumulate the gradient of the mean loss over `count` parts of the inputs; the means of the losses, fp32 [3]."""
    sums = torch.zeros(3, device=accelerator.device)
    parts = list(zip(*(tensor.chunk(count) for tensor in inputs), strict=True))
    for index, part in enumerate(parts):
        with contextlib.nullcontext() if index == len(parts) - 1 else accelerator.no_sync(module):
            losses = module(*part)
            accelerator.backward(losses[0] / len(parts))
        sums += torch.stack([value.detach().float() for value in losses]) / len(parts)
    return sums


def find_collapse(before: Mapping[str, float], now: Mapping[str, float], limit: float) -> str | None:
    """The module whose zero ratio is above `limit` and rose since the last look, in words; None if there is none."""
    for name, ratio in now.items():
        if ratio > limit and ratio > before.get(name, 1.0):
            return f"{name} collapsed: {before[name]:.1%} -> {ratio:.1%}, above {limit:.0%} and rising"
    return None


def held_out_score(run: Run) -> float:
    """Bits per byte of the student on the held-out stream."""
    assert run.held_out is not None
    nats = sum(score_document(run.student, ids) for ids in documents_of(run.held_out, run.eos))
    return nats / math.log(2) / run.held_out_bytes


def _check_finite(run: Run, step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        kept = f"the last checkpoint is {run.latest}" if run.latest.is_file() else "no checkpoint was saved yet"
        raise TrainingError(f"step {step}: the loss is {loss}, the norm of its gradient {norm}; lower --lr; {kept}")


def _show(bar: Bar, step: int, entry: dict[str, Any], zeros: dict[str, float]) -> None:
    score = f"{entry['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in entry else "aligning layers"
    parts = [f"loss {entry['loss']:.3f}", score, f"{entry['tokens_per_second']:,.0f} tok/s"]
    if zeros:
        parts.append(f"{mean(zeros.values()):.0%} zeros")
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
