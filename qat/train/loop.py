"""The training loop: a pure function of its inputs, so that a run that was interrupted and resumed gives the same bits."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor

from qat.errors import TrainingError
from qat.model import LanguageModel
from qat.recipe import Recipe
from qat.train.hooks import Hook, Interruption, Training, hooks_of
from qat.train.run import Run
from qat.train.saving import load_state, trim_metrics
from qat.train.sharding import shard, whole
from qat.train.step import Step, backward, freeze, make_optimizer
from tmexport.errors import UsageError
from tmexport.files import atomic_write


def fit(run: Run, resume: bool, hooks: Sequence[Hook] = ()) -> dict[str, Any]:
    """Train; returns a summary. The student is left with the weights of the last step. `hooks`: besides the run's own.

    Raises:
        TrainingError: the loss is not finite (the last checkpoint stays as it was), or the zero ratio collapsed (after
            saving).
        UsageError: the folder holds another run, or a checkpoint of other settings.
        KeyboardInterrupt: after saving.
    """
    loop = Loop(run, resume)
    training, recipe = loop.training, run.recipe
    started = time.monotonic()
    if training.is_main:
        run.latest.parent.mkdir(parents=True, exist_ok=True)
        trim_metrics(run.metrics, training.step)
        with atomic_write(run.folder / "recipe.toml") as file:  # not before: a run of other settings was refused
            file.write(recipe.to_toml(run.table).encode())
    run.accelerator.wait_for_everyone()
    with contextlib.ExitStack() as stack:
        entered = [stack.enter_context(hook) for hook in hooks_of(run, hooks)]
        while training.step < recipe.steps and training.stopped_by is None:
            loop.advance(entered)
        if training.stopped_by is None and any(isinstance(hook, Interruption) and hook.seen for hook in entered):
            training.stopped_by = "interruption"  # after the last vote: what follows this run shall not begin
    return {
        "steps": training.step,
        "stopped_by": training.stopped_by or "steps",
        "processes": run.accelerator.num_processes,
        "tokens": training.step * recipe.tokens_per_step,
        "seconds": round(time.monotonic() - started, 1),
        "held_out_bits_per_byte": None if training.best == math.inf else training.best,
        "zero_ratio": mean(training.zeros.values()) if training.zeros else None,
    }


def compile_layers(model: LanguageModel) -> None:
    """torch.compile each layer, in place.

    Layers of a kind share their code, but those with a fake-quantiser do not: torch makes a class of each such module. After too
    many versions it would go on without compiling.
    """
    import torch._dynamo

    layers, limits = model.backbone.layers, torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * len(layers))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * len(layers))
    for layer in layers:
        layer.compile()


class Loop:
    """A run ready to go on: models and optimiser on their devices, in the state of the last checkpoint.

    Raises:
        UsageError: as `fit`.
    """

    def __init__(self, run: Run, resume: bool) -> None:
        recipe, accelerator = run.recipe, run.accelerator
        self.run, self._share = run, _share_of_batch(recipe, accelerator.num_processes)
        if accelerator.distributed_type == DistributedType.FSDP:
            raise UsageError(
                "accelerate is configured for FSDP; configure it for several devices alone, and give --shard"
            )
        if run.teacher is not None:
            run.teacher.to(accelerator.device)
        run.student.to(accelerator.device)
        run.student.backbone.checkpoint_activations = recipe.checkpoint_activations
        freeze(run.student, recipe)
        self._trained = copy.deepcopy(run.student) if recipe.shard else run.student
        if recipe.compile:
            compile_layers(self._trained)
        self._work = Step(self._trained, run.teacher, recipe)
        if recipe.shard:
            shard(self._work, self._trained.backbone.layers, accelerator.device, accelerator.num_processes)
        optimizer = make_optimizer(self._trained, recipe)
        step, best = load_state(run.latest, self._trained, optimizer, recipe, run.inputs, resume)
        self._module = self._work if recipe.shard else accelerator.prepare(self._work)
        self._optimizer = accelerator.prepare(optimizer)
        self.training = Training(run, step, best, lambda: whole(self._optimizer.state_dict()))
        self._gather()

    def advance(self, hooks: Sequence[Hook]) -> None:
        """One step, and what the hooks do after it. Raises as `fit`."""
        run, training, began = self.run, self.training, time.monotonic()
        voters = [hook for hook in hooks if hook.votes]
        losses, norm = self._gradients()
        # Sums of every process's numbers: all must agree on when to stop.
        votes = losses.new_tensor([float(hook.wants_to_stop()) for hook in voters])
        loss, ce, kl, *agreed = run.accelerator.reduce(torch.cat([losses, votes]), "mean").tolist()
        _check_finite(run, training.step, loss, norm)
        self._optimizer.step()
        entry: dict[str, Any] = {"step": training.step, "tokens": (training.step + 1) * run.recipe.tokens_per_step}
        entry |= {"lr": run.recipe.learning_rate(training.step), "loss": loss, "grad_norm": norm}
        if self._work.objective == "predict":
            entry |= {"cross_entropy": ce, "kl": kl, "bits_per_byte": ce / math.log(2) / run.bytes_per_token}
        entry["tokens_per_second"] = round(run.recipe.tokens_per_step / (time.monotonic() - began), 1)
        training.step, training.entry, training.save = training.step + 1, entry, False
        for hook, wanted in zip(voters, agreed, strict=True):
            if wanted:
                hook.stop(training)
        self._finish(hooks)

    def _gradients(self) -> tuple[Tensor, float]:
        """This process's losses of its share of the step's batch, fp32 [3], and the norm of the gradient before clipping."""
        run, step, accelerator = self.run, self.training.step, self.run.accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = run.recipe.learning_rate(step) * group.get("share", 1.0)
        first = accelerator.process_index * self._share
        inputs = [torch.from_numpy(run.batches(step)[first : first + self._share]).to(accelerator.device)]
        self._optimizer.zero_grad(set_to_none=True)
        self._work.objective = "align" if step < run.recipe.align_steps else run.recipe.objective
        if run.teacher_cache is not None and self._work.objective == "predict":
            top = run.teacher_cache(step, first, self._share)
            inputs += [tensor.to(accelerator.device) for tensor in (top.ids, top.log_q, top.log_tail)]
        losses = backward(accelerator, self._module, inputs, run.recipe.accumulate)
        norm = whole(accelerator.clip_grad_norm_(self._module.parameters(), run.recipe.clip or math.inf)).item()
        return losses, norm

    def _finish(self, hooks: Sequence[Hook]) -> None:
        training = self.training
        if any(hook.reads_weights(training) for hook in hooks):
            self._gather()
        for hook in hooks:
            hook.after_step(training)
        if training.error is not None:
            raise training.error

    def _gather(self) -> None:
        """The student gets the whole weights of the module that trains, if that holds a part; all processes must call it."""
        if self.run.recipe.shard:
            self.run.student.load_state_dict(whole(self._trained.state_dict()))


def _share_of_batch(recipe: Recipe, processes: int) -> int:
    """Sequences a process computes for each step."""
    if recipe.batch_size % (processes * recipe.accumulate):
        raise UsageError(
            f"a batch of {recipe.batch_size} cannot be shared by {processes} processes in {recipe.accumulate} parts each; "
            "choose a --batch-size that divides"
        )
    if (recipe.align_steps or recipe.objective != "predict") and processes > 1:
        raise UsageError("aligning trains only the layers, which needs one process; train with several after it")
    if recipe.shard and processes == 1:
        raise UsageError(
            "--shard needs several processes; start them with: torchrun --nproc-per-node N -m qat.train ..."
        )
    return recipe.batch_size // processes


def _check_finite(run: Run, step: int, loss: float, norm: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        kept = f"the last checkpoint is {run.latest}" if run.latest.is_file() else "no checkpoint was saved yet"
        raise TrainingError(f"step {step}: the loss is {loss}, the norm of its gradient {norm}; lower --lr; {kept}")
