"""The Mamba-2 recurrence for a whole sequence, in chunks (the state-space dual form), in plain torch.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t + D x_t

Inside a chunk the recurrence is a masked matrix product; between chunks only one state a head is carried. Source: Dao
and Gu 2024, arXiv 2405.21060, section 6. B and C are shared by the heads of a group and are never repeated per head:
that, and products that span all heads of a group at once, is what makes it quicker than a literal transcription.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALLEST_DT = 1e-30  # the logarithm of dt is needed; padded positions have dt = 0


class _Weights(torch.autograd.Function):
    """products [.., groups, l, s], decay, dt [.., groups, heads, l], d [groups, heads] -> weights [.., groups, heads, l, s].

    weights = products * exp(decay_l - decay_s) * dt_s for s <= l, else 0; d is added on the diagonal, where it makes the
    D x of the model. products has no head axis. Written out because this is the largest tensor of the scan: the derived
    backward would pass over it eleven times, this one five.
    """

    @staticmethod
    def forward(ctx: Any, products: Tensor, decay: Tensor, dt: Tensor, d: Tensor) -> Tensor:
        length = decay.shape[-1]
        above = torch.full((length, length), -torch.inf, dtype=decay.dtype, device=decay.device).triu_(1)
        source = decay - dt.clamp_min(_SMALLEST_DT).log()
        ratio = (decay[..., :, None] - source[..., None, :]).add_(above).exp_().to(products.dtype)
        weights = products[..., None, :, :] * ratio
        weights.diagonal(dim1=-2, dim2=-1).add_(d[..., None])
        ctx.save_for_backward(products, ratio, dt)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        products, ratio, dt = ctx.saved_tensors
        grad_d = grad.diagonal(dim1=-2, dim2=-1).float().sum(-1).flatten(0, -3).sum(0)
        grad = grad * ratio
        grad_products = grad.sum(-3)
        grad.mul_(products[..., None, :, :])
        wide = torch.promote_types(grad.dtype, torch.float32)
        by_source = grad.sum(-2).to(wide)
        return grad_products, grad.sum(-1).to(wide) - by_source, by_source / dt.clamp_min(_SMALLEST_DT), grad_d


def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [batch, time, heads, headdim] and the state after the last position [batch, heads, d_state, headdim] (fp32).

    Args:
        x: [batch, time, heads, headdim].
        dt: fp32 [batch, time, heads], after softplus.
        a: fp32 [heads], negative.
        b, c: [batch, time, n_groups, d_state]; a group serves heads / n_groups consecutive heads.
        d: fp32 [heads].
        chunk: positions a chunk; any value gives the same result up to rounding.
        state: the state before the first position, zeros if None.
    """
    batch, time, heads, headdim = x.shape
    groups, d_state = b.shape[2:]
    per_group = heads // groups
    chunk = min(chunk, time)
    padding = -time % chunk
    if padding:  # dt = 0: decay 1 and no input, so padded positions change neither the state nor earlier outputs
        x, dt = F.pad(x, (0, 0, 0, 0, 0, padding)), F.pad(dt, (0, 0, 0, padding))
        b, c = F.pad(b, (0, 0, 0, 0, 0, padding)), F.pad(c, (0, 0, 0, 0, 0, padding))
    count = (time + padding) // chunk

    x = x.view(batch, count, chunk, heads, headdim)
    dt = dt.view(batch, count, chunk, heads).transpose(2, 3)  # [batch, chunks, heads, chunk]
    decay = _running_sum(dt * a[:, None])  # logarithm, from the start of the chunk up to and including a position
    b = b.view(batch, count, chunk, groups, d_state).transpose(2, 3)  # [batch, chunks, groups, chunk, d_state]
    c = c.view(batch, count, chunk, groups, d_state).transpose(2, 3)

    # 1. Within a chunk: weights[l, s] = (C_l . B_s) exp(decay_l - decay_s) dt_s for s <= l, and D where s = l
    by_group = (batch, count, groups, per_group, chunk)
    weights = _Weights.apply(c @ b.mT, decay.view(by_group), dt.reshape(by_group), d.view(groups, per_group))
    inside = weights.flatten(2, 3) @ x.transpose(2, 3)  # [batch, chunks, heads, chunk, headdim]

    # 2. What each chunk adds to the state by its end: one product for all heads of a group
    to_end = ((decay[..., -1:] - decay).exp() * dt).to(x.dtype).transpose(2, 3)[..., None]  # [.., chunk, heads, 1]
    arriving = (x * to_end).view(batch, count, chunk, groups, per_group * headdim).transpose(2, 3)
    added = b.mT @ arriving  # [batch, chunks, groups, d_state, per_group * headdim]

    # 3. The recurrence between chunks, in fp32
    over = decay[..., -1].exp().view(batch, count, groups, 1, per_group, 1).expand(-1, -1, -1, -1, -1, headdim)
    over = over.reshape(batch, count, groups, 1, per_group * headdim)
    if state is None:
        carried = added.new_zeros(batch, groups, d_state, per_group * headdim, dtype=torch.float32)
    else:
        carried = state.float().view(batch, groups, per_group, d_state, headdim).transpose(2, 3).flatten(3)
    before = []
    for kept, new in zip(over.unbind(1), added.unbind(1), strict=True):
        before.append(carried)
        carried = torch.addcmul(new.float(), carried, kept.float())

    # 4. What the state before each chunk adds to its outputs
    outside = c @ torch.stack(before, 1).to(x.dtype)  # [batch, chunks, groups, chunk, per_group * headdim]
    outside = outside.view(batch, count, groups, chunk, per_group, headdim).transpose(2, 3).flatten(3, 4)
    y = torch.addcmul(inside.transpose(2, 3), outside, decay.exp().to(x.dtype).transpose(2, 3)[..., None])
    last = (
        carried.view(batch, groups, d_state, per_group, headdim).transpose(2, 3).reshape(batch, heads, d_state, headdim)
    )
    return y.reshape(batch, time + padding, heads, headdim)[:, :time], last


def _running_sum(x: Tensor) -> Tensor:
    """The cumulative sum of the last axis. Compiled, a masked sum that is fused: torch 2.11's inductor fails at this cumsum on a GPU."""
    if torch.compiler.is_compiling():
        before = torch.ones(x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device).tril()
        return (x[..., None, :] * before).sum(-1)
    return x.cumsum(-1)


@cache
def fused_kernel() -> Callable[..., Any] | None:
    """mamba_ssm's `mamba_chunk_scan_combined`, or None where it cannot be imported (it needs CUDA to install)."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except (ImportError, OSError, RuntimeError):  # missing, or built for another torch or CUDA
        return None
    return mamba_chunk_scan_combined


def fused_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`chunked_scan` by mamba_ssm's kernel, whose states are [batch, heads, headdim, d_state]."""
    kernel = fused_kernel()
    assert kernel is not None
    before = None if state is None else state.mT.contiguous()
    y, last = kernel(x, dt, a, b, c, chunk, D=d, initial_states=before, return_final_states=True)
    return y, last.mT.float()


def choose_scan(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan for tensors on `device`: mamba_ssm's on CUDA where it imports, else `chunked_scan`."""
    return fused_scan if device.type == "cuda" and fused_kernel() is not None else chunked_scan
