"""The Mamba-2 mixer for one token. H heads of P = headdim channels, N = d_state, G = n_groups, K = d_conv."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Preset, Row
from runtime_ref.reference.convolution import convolve
from runtime_ref.reference.functions import exp, hadamard, rms_norm, silu, softplus, sum16
from runtime_ref.reference.products import matmul
from runtime_ref.weights import BranchWeights
from tmexport.model.branches.mamba2 import Mamba2


def mix(
    weights: BranchWeights, x: np.ndarray, state: dict[str, np.ndarray], preset: Preset, eps: float, position: int
) -> np.ndarray:
    """What the mixer adds for the normed x [d]; state: conv fp32 [K-1, C], and ssm [H, P, N] in the preset's format, updated."""
    c, m, v = weights.branch, weights.matrices, weights.vectors
    assert isinstance(c, Mamba2)
    heads, width, n, groups = c.n_heads, c.headdim, c.d_state, c.n_groups
    projected = matmul(m["in_proj"], x, preset.activations)
    z, xbc, dt = np.split(projected, [c.d_inner, c.d_inner + c.conv_dim])

    xbc = convolve(v["conv_weight"], v["conv_bias"], state["conv"], xbc)
    x_in = xbc[: c.d_inner].reshape(heads, width)
    b = np.repeat(xbc[c.d_inner : c.d_inner + groups * n].reshape(groups, n), heads // groups, axis=0)
    cc = np.repeat(xbc[c.d_inner + groups * n :].reshape(groups, n), heads // groups, axis=0)

    dt = softplus(dt + v["dt_bias"])
    decay = exp(dt * v["a"])
    _, *stored = state.values()
    row = Row(decay[:, None, None], decay[:, None], dt[:, None] * x_in, b[:, None, :], position)
    h, unit = preset.state.advance(stored, row)
    y = sum16(h * cc[:, None, :]) * unit + v["d"][:, None] * x_in

    gated = y.reshape(-1) * silu(z)
    if c.gate_norm:
        gated = rms_norm(gated.reshape(groups, -1), v["gate_norm"].reshape(groups, -1), eps).reshape(-1)
    if c.online_hadamard:
        gated = hadamard(gated, c.online_hadamard)
    return matmul(m["out_proj"], gated, preset.activations)
