"""The two profiles as Numba types, so that each gets its own compiled code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Exact(NamedTuple):
    """int16 activations, fp32 state."""

    levels: np.float32


class Fast(NamedTuple):
    """int8 activations, fp16 state."""

    levels: np.float32


PROFILES = {"exact": Exact(np.float32(32512.0)), "fast": Fast(np.float32(127.0))}
STATE_DTYPES = {"exact": np.dtype(np.float32), "fast": np.dtype(np.float16)}
