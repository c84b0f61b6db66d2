"""The Mamba-2 recurrence for a whole sequence, in chunks (the state-space dual form), in plain torch.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = S_t^T C_t

Inside a chunk the recurrence is a masked matrix product; between chunks only one state a head is carried. Source: Dao
and Gu 2024, arXiv 2405.21060, section 6. B and C are shared by the heads of a group and are never repeated per head:
that, and products that span all heads of a group at once, is what makes it quicker than a literal transcription.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _DecayedProducts(torch.autograd.Function):
    """products [..., l, s] and decay [..., heads, l] -> products * exp(decay_l - decay_s) for s <= l, else 0.

    products has no head axis; the result [..., heads, l, s] does. Written out because this is the largest tensor of the
    scan: the derived backward would pass over it eleven times, this one five.
    """

    @staticmethod
    def forward(ctx: Any, products: Tensor, decay: Tensor) -> Tensor:
        length = decay.shape[-1]
        above = torch.full((length, length), -torch.inf, dtype=decay.dtype, device=decay.device).triu_(1)
        ratio = (decay[..., :, None] - decay[..., None, :]).add_(above).exp_().to(products.dtype)
        ctx.save_for_backward(products, ratio)
        return products[..., None, :, :] * ratio

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        products, ratio = ctx.saved_tensors
        grad = grad * ratio
        grad_products = grad.sum(-3)
        grad.mul_(products[..., None, :, :])
        return grad_products, (grad.sum(-1) - grad.sum(-2)).to(torch.promote_types(grad.dtype, torch.float32))


def chunked_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [batch, time, heads, headdim] and the state after the last position [batch, heads, d_state, headdim] (fp32).

    Args:
        x: [batch, time, heads, headdim].
        dt: fp32 [batch, time, heads], after softplus.
        a: fp32 [heads], negative.
        b, c: [batch, time, n_groups, d_state]; a group serves heads / n_groups consecutive heads.
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

    # [batch, chunks, heads, chunk]: logarithm of the decay from the start of the chunk up to and including a position
    decay = (dt * a).view(batch, count, chunk, heads).permute(0, 1, 3, 2).cumsum(-1)
    dtx = (x * dt[..., None].to(x.dtype)).view(batch, count, chunk, heads, headdim)
    b = b.view(batch, count, chunk, groups, d_state).transpose(2, 3)  # [batch, chunks, groups, chunk, d_state]
    c = c.view(batch, count, chunk, groups, d_state).transpose(2, 3)

    # 1. Within a chunk: weights[l, s] = (C_l . B_s) exp(decay_l - decay_s) for s <= l
    weights = _DecayedProducts.apply(c @ b.mT, decay.view(batch, count, groups, per_group, chunk))
    inside = weights.view(batch, count, heads, chunk, chunk) @ dtx.transpose(
        2, 3
    )  # [batch, chunks, heads, chunk, headdim]

    # 2. What each chunk adds to the state by its end: one product for all heads of a group
    to_end = (decay[..., -1:] - decay).exp().to(x.dtype).transpose(2, 3)[..., None]  # [batch, chunks, chunk, heads, 1]
    arriving = (dtx * to_end).view(batch, count, chunk, groups, per_group * headdim).transpose(2, 3)
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
    y = inside.transpose(2, 3) + outside * decay.exp().to(x.dtype).transpose(2, 3)[..., None]
    last = (
        carried.view(batch, groups, d_state, per_group, headdim).transpose(2, 3).reshape(batch, heads, d_state, headdim)
    )
    return y.reshape(batch, time + padding, heads, headdim)[:, :time], last
