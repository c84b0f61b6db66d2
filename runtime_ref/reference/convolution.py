"""The causal convolution before a scan."""

from __future__ import annotations

import numpy as np

from runtime_ref.reference.functions import silu


def convolve(weight: np.ndarray, bias: np.ndarray, state: np.ndarray, x: np.ndarray) -> np.ndarray:
    """silu of the convolution's output [C] for one token's x [C]; the state [K-1, C], oldest first, is updated.

    weight [K, C], the oldest input's first; bias [C].
    """
    window = np.concatenate([state, x[None]])
    state[...] = window[1:]
    total = bias
    for tap, row in zip(weight, window, strict=True):
        total = total + tap * row
    return silu(total)
