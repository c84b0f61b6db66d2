"""One step: the losses of a batch, their gradients, and the optimiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qat.losses import TopPredictions, alignment_loss, distillation_loss
from qat.model import LanguageModel
from qat.recipe import Recipe
from qat.train.teacher import Teacher


class Step(nn.Module):
    """ids int64 [batch, seq_len + 1] -> (loss, cross-entropy, KL). The teacher is not part of its parameters.

    While `aligning`, the loss is that of each layer against the teacher's, and the other two are NaN.
    """

    def __init__(self, student: LanguageModel, teacher: Teacher | None, recipe: Recipe) -> None:
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
                aligned = alignment_loss(self.student.backbone.blocks, teacher.stream(inputs))
                unknown = torch.full((), math.nan, device=ids.device)
                return aligned, unknown, unknown
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


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; decay on matrices only, never on norms, convolutions, biases, A, D, dt or scales."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and not name.endswith(".scale")]
    others = [p for name, p in named if p.ndim != 2 or name.endswith(".scale")]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


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
