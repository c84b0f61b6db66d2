"""The training loss, (1 - w) CE + w T^2 KL(teacher || student), from hidden states and without storing the logits.

The logits of 4,000 tokens over 50,000 entries would be 800 MB, and as much again for each of the softmaxes and
gradients. Here they live only for a few rows at a time: the gradients with respect to the hidden states and the head
are made in the forward pass, row chunk by row chunk. Source of the loss: Hinton et al. 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from tmexport.errors import UsageError

if TYPE_CHECKING:
    from qat.model import ResidualBlock

_Item = TypeVar("_Item")
_LOGITS_AT_ONCE = 2**21  # entries (8 MB in fp32): a chunk stays in a CPU's last cache
_ON_A_GPU = 2**27  # 512 MB: what a chunk's dozen kernels take to start would be more than its work


def rows_at_once(vocab_size: int, device: torch.device | None = None) -> int:
    """Positions whose logits are made at a time."""
    entries = _ON_A_GPU if device is not None and device.type == "cuda" else _LOGITS_AT_ONCE
    return max(1, entries // vocab_size)


@dataclass(frozen=True)
class Loss:
    """Means over the tokens, in nats. `total` carries the gradient."""

    total: Tensor
    cross_entropy: Tensor
    kl: Tensor


@dataclass(frozen=True)
class TopPredictions:
    """A teacher's k most probable tokens: ids int64 [..., k], log_q fp32 [..., k]; log_tail fp32 [...] is the log of the rest."""

    ids: Tensor
    log_q: Tensor
    log_tail: Tensor

    def flatten(self) -> TopPredictions:
        """All positions in one axis."""
        return TopPredictions(self.ids.flatten(0, -2), self.log_q.flatten(0, -2), self.log_tail.flatten())


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    kd_weight: float = 0.0,
    temperature: float = 1.0,
    top: TopPredictions | None = None,
) -> Loss:
    """The loss of a student on the text and, if kd_weight > 0, against its teacher.

    Args:
        hidden: [..., d_model], the student's final hidden states.
        head: [vocab, d_model].
        targets: int64 [...], the next tokens.
        teacher_hidden, teacher_head: the same for the teacher (any width).
        top: in their place, the teacher's most probable tokens, taken at the same temperature; the KL is then that between
            the k + 1 events "each of these tokens" and "any other token".
        kd_weight: w, from 0 (cross-entropy only) to 1 (distillation only).
        temperature: T, by which both logits are divided inside the KL.
    """
    known: tuple[Tensor, ...] = ()
    if kd_weight > 0 and top is not None:
        flat = top.flatten()
        known = (flat.ids, flat.log_q, flat.log_tail)
    elif kd_weight > 0 and teacher_hidden is not None and teacher_head is not None:
        known = (teacher_hidden.flatten(0, -2).detach(), teacher_head.detach())
    return Loss(
        *_ChunkedLoss.apply(
            hidden.flatten(0, -2), head, targets.flatten(), float(kd_weight), float(temperature), *known
        )
    )


def _dense_divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the rows of KL(q || p), and its gradient with respect to p's logits [rows, vocab]."""
    q = log_q.exp()
    return torch.dot(q.flatten(), (log_q - log_p).flatten()), log_p.exp().sub_(q)


def _top_divergence(log_p: Tensor, ids: Tensor, log_q: Tensor, log_tail: Tensor) -> tuple[Tensor, Tensor]:
    """The same where q is known as k tokens and the mass of all others."""
    p = log_p.exp()
    log_p_top, p_top = log_p.gather(-1, ids), p.gather(-1, ids)
    p_tail = p.scatter(-1, ids, 0.0).sum(-1).clamp_min_(1e-12)
    q, q_tail = log_q.exp(), log_tail.exp()
    divergence = torch.dot(q.flatten(), (log_q - log_p_top).flatten()) + torch.dot(q_tail, log_tail - p_tail.log())
    # sum(q) + q_tail is 1 up to the rounding of the stored values; p carries the same total, so that the gradient of a
    # student equal to its teacher is zero.
    total = q.sum(-1) + q_tail
    grad = p.mul_((total - q_tail / p_tail)[:, None])
    return divergence, grad.scatter_(-1, ids, p_top * total[:, None] - q)


def alignment_loss(student: Sequence[nn.Module], stream: Iterable[Tensor]) -> Tensor:
    """How far each student block is from the teacher's on the teacher's own hidden states, as a share of what it adds.

    mean over the blocks that train of |student(h) - teacher(h)|^2 / |teacher(h) - h|^2: the second stage of MOHAWK (Bick et al.
    2024, arXiv 2408.10189). No block sees another's error, so all are trained at once, each on its own.

    Args:
        student: blocks [batch, time, d_model] -> the same shape, with a residual connection inside.
        stream: the teacher's hidden states, one more than there are blocks: what enters the first, then what leaves each.
    """
    total: Tensor | float = 0.0
    count = 0
    for block, (before, after) in zip(student, pairwise(_without_gradient(stream)), strict=True):
        if not any(parameter.requires_grad for parameter in block.parameters()):
            continue
        total = total + block_error(block, before, after)
        count += 1
    return torch.as_tensor(total / max(1, count))


def block_error(block: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """|block(before) - after|^2 / |after - before|^2: 0 is the teacher's block, 1 one that adds nothing."""
    size = (after - before).square().mean()
    return (block(before) - after).square().mean() / size.clamp_min(1e-12)


def orientation_loss(student: Sequence[ResidualBlock], mixing: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """How far the matrices by which the student's state-space mixers mix positions are from the teacher's, on the teacher's input.

    mean over the blocks of |M - A|^2 / |A|^2 (Frobenius): the first stage of MOHAWK. The matrices of the heads that stand for one
    of the teacher's are added.

    Args:
        student: blocks; those with a mixer that the teacher's block has not are compared.
        mixing: of each block of the teacher, what enters it and its matrices [batch, heads, time, time], or None.
    """
    total: Tensor | float = 0.0
    count = 0
    for block, (before, wanted) in zip(student, _without_gradient(mixing), strict=True):
        branch = block.branches[0]
        if wanted is None or not any(parameter.requires_grad for parameter in branch.parameters()):
            continue
        found = branch.mixing(block.norm(before))
        if found is None or found.shape[1] % wanted.shape[1]:
            raise UsageError(f"{0 if found is None else found.shape[1]} heads cannot be oriented to {wanted.shape[1]}")
        found = found.unflatten(1, (wanted.shape[1], -1)).sum(2)
        total = total + (found - wanted).square().sum() / wanted.square().sum().clamp_min(1e-12)
        count += 1
    return torch.as_tensor(total / max(1, count))


@torch.no_grad()
def _without_gradient(stream: Iterable[_Item]) -> Iterator[_Item]:
    yield from stream


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        w: float,
        t: float,
        *known: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden.shape[0]
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if need_head else None
        sum_ce = torch.zeros((), device=hidden.device)
        sum_kl = torch.zeros((), device=hidden.device)
        step = rows_at_once(head.shape[0], hidden.device)
        if torch.is_autocast_enabled(head.device.type):  # once: autocast would do it again for every chunk and product
            head = head.to(torch.get_autocast_dtype(head.device.type))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            h, target = hidden[part], targets[part, None]
            logits = (h @ head.t()).float()
            log_p = torch.log_softmax(logits, -1)
            sum_ce -= log_p.gather(-1, target).sum()
            grad = None
            if need_hidden or need_head:
                grad = log_p.exp() if known else log_p.exp_()
                if w:
                    grad.mul_(1 - w)
                grad.scatter_add_(-1, target, torch.full_like(target, w - 1, dtype=grad.dtype))
            if known:
                log_pt = log_p if t == 1.0 else torch.log_softmax(logits.div_(t), -1)
                if len(known) == 2:
                    teacher = (known[0][part] @ known[1].t()).float().div_(t)
                    kl, grad_kl = _dense_divergence(log_pt, torch.log_softmax(teacher, -1))
                else:
                    kl, grad_kl = _top_divergence(log_pt, *(tensor[part] for tensor in known))
                sum_kl += kl
                if grad is not None:
                    grad.add_(grad_kl, alpha=w * t)
            if grad is not None:
                grad = grad.to(h.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = grad @ head
                if grad_head is not None:
                    grad_head += grad.t() @ h
        for gradient in (grad_hidden, grad_head):  # here and not in each chunk: there is less to divide
            if gradient is not None:
                gradient.div_(rows)
        sum_ce, sum_kl = sum_ce / rows, sum_kl / rows
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(sum_ce, sum_kl)
        return (1 - w) * sum_ce + w * t * t * sum_kl, sum_ce, sum_kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _ce: Tensor, _kl: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad,
            *(None,) * (len(ctx.needs_input_grad) - 2),
        )
