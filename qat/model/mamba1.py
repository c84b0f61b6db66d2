"""The Mamba-1 mixer in torch: parameters named as in Hugging Face's `MambaForCausalLM`.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = h_t C_t + D x_t        (a channel; A, B, C and h have d_state values)

Gu and Dao 2023, arXiv 2312.00752, section 3. The scan goes a step at a time in plain torch: right everywhere, and slow for long
sequences, because every channel has decays of its own and nothing can be a product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.branch import BranchModule
from qat.model.mamba2 import CausalConv
from tmexport.model.branches.mamba1 import Mamba1

_DT_RANGE = (0.001, 0.1)  # mamba_ssm's range for the initial time steps


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [batch, time, channels] and the state after the last position [batch, channels, d_state], in fp32.

    Args:
        x: [batch, time, channels].
        dt: fp32 [batch, time, channels], after softplus.
        a: fp32 [channels, d_state], negative.
        b, c: [batch, time, d_state].
        d: fp32 [channels].
        state: the state before the first position, zeros if None.
    """
    wide, b, c = x.float(), b.float(), c.float()
    h = x.new_zeros(x.shape[0], *a.shape, dtype=torch.float32) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = (step * a).exp() * h + (step * wide[:, t, :, None]) * b[:, t, None]
        outputs.append((h * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1) + d * wide, h


@dataclass
class Mamba1State:
    """What one mixer remembers: conv [batch, d_conv - 1, d_inner]; ssm fp32 [batch, d_inner, d_state]."""

    conv: Tensor | None = None
    ssm: Tensor | None = None


class Mamba1Mixer(BranchModule):
    """A Mamba-1 mixer, [batch, time, d_model] -> the same shape. `eps` is not used: it has no norm; `depth`: blocks."""

    fresh_state = Mamba1State
    scan: Callable[..., tuple[Tensor, Any]] | None = None  # None: `selective_scan`

    def __init__(self, config: Mamba1, eps: float, depth: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.conv1d = CausalConv(config.d_inner, config.d_conv)
        self.x_proj = nn.Linear(config.d_inner, config.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, config.d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(config.dt_rank**-0.5), config.dt_rank**-0.5)
        low, high = (math.log(limit) for limit in _DT_RANGE)
        dt = torch.exp(torch.rand(config.d_inner) * (high - low) + low)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        states = torch.arange(1, config.d_state + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(states).repeat(config.d_inner, 1))
        self.D = nn.Parameter(torch.ones(config.d_inner))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        nn.init.normal_(self.out_proj.weight, std=0.5 / math.sqrt(config.d_inner * depth))

    def forward(self, hidden: Tensor, state: Mamba1State | None = None) -> Tensor:
        config = self.config
        x, z = self.in_proj(hidden).chunk(2, -1)
        x, recent = self.conv1d(x, state.conv if state else None)
        dt, b, c = self.x_proj(x).split([config.dt_rank, config.d_state, config.d_state], -1)
        dt = F.softplus((dt @ self.dt_proj.weight.t()).float() + self.dt_proj.bias)
        a = -torch.exp(self.A_log.float())
        y, last = (self.scan or selective_scan)(x, dt, a, b, c, self.D.float(), state.ssm if state else None)
        if state is not None:
            state.conv, state.ssm = recent, last
        return self.out_proj((y * F.silu(z.float())).to(hidden.dtype))

    def operations(self, seq_len: int) -> int:
        """Multiplications and additions a token, forward, of the scan and the convolution (not of its matrices)."""
        config = self.config
        return config.d_inner * (7 * config.d_state + 2 * config.d_conv + 3)
