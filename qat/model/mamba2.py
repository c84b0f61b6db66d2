"""The Mamba-2 mixer in torch: parameters named as in Hugging Face's `Mamba2ForCausalLM`, arithmetic of `mamba_ssm`.

The equations: Dao and Gu 2024, arXiv 2405.21060, section 7. With n_groups > 1 the gated norm works per group, as in
mamba_ssm. The scan is in ssd.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.branch import BranchModule
from qat.model.ssd import choose_scan
from tmexport.model.branches.mamba2 import Mamba2

_DT_RANGE = (0.001, 0.1)  # mamba_ssm's range for the initial time steps


def default_chunk(device: torch.device) -> int:
    """Positions a chunk of the scan: shorter suits a CPU's caches, longer a GPU's matrix units (measured on a CPU)."""
    return 32 if device.type == "cpu" else 256


class _GatedNorm(torch.autograd.Function):
    """u / rms(u) * weight with u = y * silu(z), the rms over each of `groups` parts of the last axis; fp32 inside.

    The backward is written out: it passes over its tensors half as often as the derived one, and keeps fewer of them.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
        gate = F.silu(z)
        u = (y * gate).float().unflatten(-1, (groups, -1))
        inverse = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_().div_(u.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(y, z, gate, weight, inverse)
        return u.mul_(inverse).flatten(-2).mul_(weight).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, gate, weight, inverse = ctx.saved_tensors
        split = (inverse.shape[-2], -1)
        grad = grad.float()
        normal = (y * gate).float().unflatten(-1, split).mul_(inverse)
        product = normal.flatten(-2) * grad
        grad_weight = product.flatten(0, -2).sum(0)
        shared = torch.einsum("...gk,gk->...g", product.unflatten(-1, split), weight.float().view(split))[..., None]
        grad_u = (grad * weight).unflatten(-1, split)
        grad_u = grad_u.addcmul_(normal, shared, value=-1 / normal.shape[-1]).mul_(inverse).flatten(-2).to(y.dtype)
        return grad_u * gate, torch.ops.aten.silu_backward(grad_u.mul_(y), z), grad_weight.to(weight.dtype), None, None


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z), over each of `groups` equal parts of the last axis."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return _GatedNorm.apply(y, z, self.weight, self.eps, self.groups)


class _ConvSilu(torch.autograd.Function):
    """silu(bias + sum over taps of weight[:, tap] * padded[:, time + tap]), [batch, time + kernel - 1, channels] in.

    Shifted multiply-adds in the layout at hand, with the backward written out: on a CPU twice as quick as the same
    through autograd or the library's grouped convolution, which wants the channels outside.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight[:, 0].t().to(padded.dtype)
        time = padded.shape[1] - len(taps) + 1
        y = torch.addcmul(bias.to(padded.dtype), padded[:, :time], taps[0])
        for tap in range(1, len(taps)):
            y.addcmul_(padded[:, tap : tap + time], taps[tap])
        ctx.save_for_backward(padded, weight, y)
        return F.silu(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, weight, y = ctx.saved_tensors
        taps, time = weight[:, 0].t().to(padded.dtype), y.shape[1]
        grad = torch.ops.aten.silu_backward(grad, y)
        grad_padded = torch.zeros_like(padded)
        for tap in range(len(taps)):
            grad_padded[:, tap : tap + time].addcmul_(grad, taps[tap])
        grad_taps = [(padded[:, tap : tap + time] * grad).sum((0, 1)) for tap in range(len(taps))]
        return grad_padded, torch.stack(grad_taps, 1)[:, None].to(weight.dtype), grad.sum((0, 1)).to(weight.dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time and SiLU; weight [channels, 1, kernel], bias [channels]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.uniform_(self.weight, -1 / math.sqrt(kernel), 1 / math.sqrt(kernel))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[batch, time, channels] -> the same shape, and the kernel - 1 inputs that the next call needs as `before`."""
        keep = self.weight.shape[2] - 1
        padded = F.pad(x, (0, 0, keep, 0)) if before is None else torch.cat([before, x], 1)
        return _ConvSilu.apply(padded, self.weight, self.bias), padded[:, padded.shape[1] - keep :]


class Hadamard(nn.Module):
    """Every `size` neighbours of the last axis times the orthonormal Hadamard matrix of that size (Sylvester's); in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (-1, self.size))
        stride = 1
        while stride < self.size:
            a, b = parts.unflatten(-1, (-1, 2, stride)).unbind(-2)
            parts = torch.stack([a + b, a - b], -2).flatten(-3)
            stride *= 2
        return (parts * self.size**-0.5).flatten(-2).to(x.dtype)


class Gate(nn.Module):
    """y * silu(z), in fp32: what a mixer without a norm has in its place."""

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return (y.float() * F.silu(z.float())).to(y.dtype)


@dataclass
class Mamba2State:
    """What one mixer remembers: the last d_conv - 1 inputs of the convolution and the state of every head.

    conv: [batch, d_conv - 1, conv_dim]; ssm: fp32 [batch, heads, d_state, headdim].
    """

    conv: Tensor | None = None
    ssm: Tensor | None = None


class Mamba2Mixer(BranchModule):
    """A Mamba-2 mixer, [batch, time, d_model] -> the same shape. `eps`: of its norm; `depth`: blocks of the model."""

    fresh_state = Mamba2State
    norms_before: Mapping[str, str | None] = {"in_proj": None, "out_proj": "norm"}
    scan: Callable[..., tuple[Tensor, Any]] | None = None  # None: the one for the device

    def __init__(self, config: Mamba2, eps: float, depth: int) -> None:
        super().__init__()
        self.config = config
        if not config.gate_norm or config.online_hadamard:
            self.norms_before = {"in_proj": None}
        self.in_proj = nn.Linear(config.d_model, config.d_in_proj, bias=False)
        self.conv1d = CausalConv(config.conv_dim, config.d_conv)
        low, high = (math.log(limit) for limit in _DT_RANGE)
        dt = torch.exp(torch.rand(config.n_heads) * (high - low) + low)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.empty(config.n_heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.scanned = nn.Identity()  # a place for hooks: the scan's output [batch, time, heads, headdim]
        self.norm = GatedNorm(config.d_inner, eps, config.n_groups) if config.gate_norm else Gate()
        self.turn = Hadamard(config.online_hadamard) if config.online_hadamard else nn.Identity()
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        nn.init.normal_(self.out_proj.weight, std=0.5 / math.sqrt(config.d_inner * depth))

    def forward(self, hidden: Tensor, state: Mamba2State | None = None) -> Tensor:
        config = self.config
        bc = config.n_groups * config.d_state
        z, xbc, dt = self.in_proj(hidden).split([config.d_inner, config.conv_dim, config.n_heads], -1)
        xbc, recent = self.conv1d(xbc, state.conv if state else None)
        x, b, c = xbc.split([config.d_inner, bc, bc], -1)
        x = x.unflatten(-1, (config.n_heads, config.headdim))
        y, last = (self.scan or choose_scan(hidden.device))(
            x,
            F.softplus(dt.float() + self.dt_bias),
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (config.n_groups, config.d_state)),
            c.unflatten(-1, (config.n_groups, config.d_state)),
            self.D.float(),
            default_chunk(hidden.device),
            state.ssm if state else None,
        )
        if state is not None:
            state.conv, state.ssm = recent, last
        return self.out_proj(self.turn(self.norm(self.scanned(y).flatten(-2), z)))

    def mixing(self, hidden: Tensor) -> Tensor:
        """[i, j] of a head is what x at j adds to y at i: C_i . B_j exp(sum of dt A between) dt_j, and D where i = j."""
        config = self.config
        bc = config.n_groups * config.d_state
        _, xbc, dt = self.in_proj(hidden).split([config.d_inner, config.conv_dim, config.n_heads], -1)
        _, b, c = self.conv1d(xbc)[0].split([config.d_inner, bc, bc], -1)
        b, c = (m.float().unflatten(-1, (config.n_groups, config.d_state)).transpose(1, 2) for m in (b, c))
        step = F.softplus(dt.float() + self.dt_bias).transpose(1, 2)  # [batch, heads, time]
        decay = (step * -torch.exp(self.A_log.float())[:, None]).cumsum(-1)
        future = torch.ones(dt.shape[1], dt.shape[1], dtype=torch.bool, device=dt.device).triu(1)
        ratio = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()
        products = (c @ b.mT).repeat_interleave(config.n_heads // config.n_groups, 1)
        return products * ratio * step[..., None, :] + torch.diag_embed(self.D.float()[:, None].expand(-1, dt.shape[1]))

    def operations(self, seq_len: int) -> int:
        """Multiplications and additions a token, forward, on a GPU, of the scan and the convolution (not of its matrices)."""
        config, chunk = self.config, min(seq_len, default_chunk(torch.device("cuda")))
        inside = chunk * (config.n_groups * config.d_state + config.d_inner)
        return 2 * (inside + 2 * config.d_state * config.d_inner + config.d_conv * config.conv_dim)
