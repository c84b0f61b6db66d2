"""The Mamba-1 mixer for one token. C = d_inner channels, each with N = d_state states of their own decays; R = dt_rank."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.reference.convolution import convolve
from runtime_ref.reference.functions import exp, silu, softplus, sum16
from runtime_ref.reference.products import matmul
from runtime_ref.weights import BranchWeights
from tmexport.model.branches.mamba1 import Mamba1


def mix(weights: BranchWeights, x: np.ndarray, state: dict[str, np.ndarray], preset: Preset, eps: float) -> np.ndarray:
    """What the mixer adds for the normed x [d]; state: conv fp32 [K-1, C] and ssm [C, N] in the preset's format, updated."""
    c, m, v = weights.branch, weights.matrices, weights.vectors
    assert isinstance(c, Mamba1)
    x_in, z = np.split(matmul(m["in_proj"], x, preset.activations), 2)
    x_in = convolve(v["conv_weight"], v["conv_bias"], state["conv"], x_in)
    low, b, cc = np.split(matmul(m["x_proj"], x_in, preset.activations), [c.dt_rank, c.dt_rank + c.d_state])
    dt = softplus(matmul(m["dt_proj"], low, preset.activations) + v["dt_bias"])

    stored = (state["ssm"],)
    h = preset.state.read(stored) * exp(dt[:, None] * v["a"])
    h = h + (dt * x_in)[:, None] * b[None, :]
    preset.state.write(stored, h)  # y below reads h before this rounding
    y = sum16(h * cc[None, :]) + v["d"] * x_in
    return matmul(m["out_proj"], y * silu(z), preset.activations)
