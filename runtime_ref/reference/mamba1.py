"""The Mamba-1 mixer for one token. C = d_inner channels, each with N = d_state states of their own decays; R = dt_rank."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Preset, Row
from runtime_ref.reference.convolution import convolve
from runtime_ref.reference.functions import exp, silu, softplus, sum16
from runtime_ref.reference.products import matmul
from runtime_ref.weights import BranchWeights
from tmexport.model.branches.mamba1 import Mamba1


def mix(
    weights: BranchWeights, x: np.ndarray, state: dict[str, np.ndarray], preset: Preset, eps: float, position: int
) -> np.ndarray:
    """What the mixer adds for the normed x [d]; state: conv fp32 [K-1, C] and ssm [C, N] in the preset's format, updated."""
    c, m, v = weights.branch, weights.matrices, weights.vectors
    assert isinstance(c, Mamba1)
    x_in, z = np.split(matmul(m["in_proj"], x, preset.activations), 2)
    x_in = convolve(v["conv_weight"], v["conv_bias"], state["conv"], x_in)
    low, b, cc = np.split(matmul(m["x_proj"], x_in, preset.activations), [c.dt_rank, c.dt_rank + c.d_state])
    dt = softplus(matmul(m["dt_proj"], low, preset.activations) + v["dt_bias"])

    _, *stored = state.values()
    slowest = exp(dt * v["a"].max(axis=1))
    row = Row(exp(dt[:, None] * v["a"]), slowest, dt * x_in, b[None, :], position)
    h, unit = preset.state.advance(stored, row)
    y = sum16(h * cc[None, :]) * unit + v["d"] * x_in
    return matmul(m["out_proj"], y * silu(z), preset.activations)
