"""RMSNorm of one row (`reference.rms_norm`)."""

from __future__ import annotations

import numpy as np

from runtime_ref.kernels.compiled import kernel
from runtime_ref.kernels.vector import load, splat, store, tree_sum, widen

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba


@kernel
def rms_norm(x, weight, out, eps):
    """`reference.rms_norm` of one vector; returns False if it holds an Inf or a NaN."""
    n = x.shape[0]
    lanes = splat(np.float64(0.0))
    for i in range(0, n, 16):
        wide = widen(load(x, i))
        lanes = lanes + wide * wide
    mean = tree_sum(lanes) / np.float64(n)
    inverse = splat(np.float32(1.0 / np.sqrt(mean + eps)))
    for i in range(0, n, 16):
        store(out, i, (load(x, i) * inverse) * load(weight, i))
    return np.isfinite(mean)
