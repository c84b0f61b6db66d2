"""One step: the losses of a batch, their gradients, and the optimiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qat.losses import TopPredictions, alignment_loss, distillation_loss, orientation_loss
from qat.model import LanguageModel
from qat.model.mamba1 import Mamba1Mixer
from qat.model.mamba2 import Mamba2Mixer
from qat.recipe import Recipe
from qat.train.teacher import Teacher
from tmexport.errors import UsageError

STATE_SPACE = (Mamba1Mixer, Mamba2Mixer)


class Step(nn.Module):
    """ids int64 [batch, seq_len + 1] -> (loss, cross-entropy, KL). The teacher is not part of its parameters.

    While the objective is another than predict, the loss is that of layers against the teacher's, and the other two are NaN.
    """

    def __init__(self, student: LanguageModel, teacher: Teacher | None, recipe: Recipe) -> None:
        super().__init__()
        self.student = student
        self._teacher = (teacher,)  # in a tuple: not a submodule
        self.recipe = recipe
        self.objective = recipe.objective

    def forward(self, ids: Tensor, *top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`top`: the fields of TopPredictions, if the teacher was asked before."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        teacher, recipe = self._teacher[0], self.recipe
        known = None
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
            if self.objective != "predict":
                assert teacher is not None
                blocks, unknown = self.student.backbone.blocks, torch.full((), math.nan, device=ids.device)
                if self.objective == "orient":
                    return orientation_loss(blocks, teacher.mixing(inputs)), unknown, unknown
                return alignment_loss(blocks, teacher.stream(inputs)), unknown, unknown
            if teacher is not None and recipe.kd_weight > 0 and not top:
                with torch.no_grad():
                    known = teacher.hidden(inputs)
            loss = distillation_loss(
                self.student.hidden(inputs),
                self.student.head_weight,
                targets,
                known,
                teacher.head_weight if teacher is not None else None,
                recipe.kd_weight if known is not None or top else 0.0,
                recipe.temperature,
                TopPredictions(*top) if top else None,
            )
        return loss.total, loss.cross_entropy, loss.kl


def mixer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those of the state-space mixers."""
    return (p for module in model.modules() if isinstance(module, STATE_SPACE) for p in module.parameters())


def freeze(model: LanguageModel, recipe: Recipe) -> None:
    """Take the gradient from what a recipe leaves as it is.

    Raises:
        UsageError: nothing is left to train.
    """
    if recipe.freeze_embedding:
        for tensor in model.backbone.embeddings.parameters():
            tensor.requires_grad_(False)
        if not model.config.tie_embeddings:
            model.lm_head.requires_grad_(False)
    if recipe.rest_lr == 0:
        mixers = set(mixer_parameters(model))
        if not mixers:
            raise UsageError("rest_lr 0 trains the state-space mixers alone, and the model has none")
        for p in model.parameters():
            p.requires_grad_(p in mixers)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW of what trains; decay on matrices only, never on norms, convolutions, biases, A, D, dt or scales.

    Each group has a `share`, by which its learning rate is multiplied.
    """
    mixers = set(mixer_parameters(model))
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_matrix = p.ndim == 2 and not name.endswith(".scale")
            groups.setdefault((1.0 if p in mixers else recipe.rest_lr, is_matrix), []).append(p)
    parts = [
        {"params": found, "weight_decay": recipe.weight_decay if is_matrix else 0.0, "share": share}
        for (share, is_matrix), found in groups.items()
    ]
    return torch.optim.AdamW(parts, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def backward(accelerator: Accelerator, module: nn.Module, inputs: Sequence[Tensor], count: int) -> Tensor:
    """Accumulate the gradient of the mean loss over `count` parts of the inputs; the means of the losses, fp32 [3]."""
    sums = torch.zeros(3, device=accelerator.device)
    parts = list(zip(*(tensor.chunk(count) for tensor in inputs), strict=True))
    for index, part in enumerate(parts):
        with contextlib.nullcontext() if index == len(parts) - 1 else accelerator.no_sync(module):
            losses = module(*part)
            accelerator.backward(losses[0] / len(parts))
        sums += torch.stack([value.detach().float() for value in losses]) / len(parts)
    return sums
