"""The training loss, (1 - w) CE + w T^2 KL(teacher || student), from hidden states and without storing the logits.

The logits of 4,000 tokens over 50,000 entries would be 800 MB, and as much again for each of the softmaxes and
gradients. Here they live only for a few rows at a time: the gradients with respect to the hidden states and the head
are made in the forward pass, row chunk by row chunk. Source of the loss: Hinton et al. 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOGITS_AT_ONCE = 2**21  # entries (8 MB in fp32): a chunk stays in a CPU's last cache and is negligible on a GPU


@dataclass(frozen=True)
class Loss:
    """Means over the tokens, in nats. `total` carries the gradient."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
) -> Loss:
    """The loss of a student, and of its teacher if there is one.

    Args:
        hidden: [..., d_model], the student's final hidden states.
        head: [vocab, d_model].
        targets: int64 [...], the next tokens.
        teacher_hidden, teacher_head: the same for the teacher (any width); needed if kd_weight > 0.
        kd_weight: w, from 0 (cross-entropy only) to 1 (distillation only).
        temperature: T, by which both logits are divided inside the KL.
    """
    flat = hidden.flatten(0, -2)
    teacher = teacher_hidden.flatten(0, -2).detach() if teacher_hidden is not None and kd_weight > 0 else None
    total, cross_entropy, kl = _ChunkedLoss.apply(
        flat, head, targets.flatten(), teacher, teacher_head, float(kd_weight), float(temperature)
    )
    return Loss(total, cross_entropy, kl)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        w: float,
        t: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        sum_ce = torch.zeros((), device=hidden.device)
        sum_kl = torch.zeros((), device=hidden.device)
        step = max(1, _LOGITS_AT_ONCE // head.shape[0])
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            h, target = hidden[part], targets[part, None]
            logits = (h @ head.t()).float()
            log_p = torch.log_softmax(logits, -1)
            sum_ce -= log_p.gather(-1, target).sum()
            grad = None
            if need_hidden or need_head:
                grad = log_p.exp().mul_(1 - w)
                grad.scatter_add_(-1, target, torch.full_like(target, w - 1, dtype=grad.dtype))
            if teacher is not None:
                assert teacher_head is not None
                log_q = torch.log_softmax((teacher[part] @ teacher_head.t()).float().div_(t), -1)
                q = log_q.exp()
                log_pt = log_p if t == 1.0 else torch.log_softmax(logits.div_(t), -1)
                sum_kl += torch.dot(q.flatten(), (log_q - log_pt).flatten())
                if grad is not None:
                    grad.add_(log_pt.exp().sub_(q), alpha=w * t)
            if grad is not None:
                grad = grad.div_(rows).to(h.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ head
                if grad_head is not None:
                    grad_head += grad.t() @ h
        ce, kl = sum_ce / rows, sum_kl / rows
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(ce, kl)
        return (1 - w) * ce + w * t * t * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _ce: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad,
            *(None,) * 5,
        )
