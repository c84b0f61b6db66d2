"""Values rounded in blocks of 32: Q8_0 and Q4_0."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference.functions import quantize
from runtime_ref.reference.integers import integer_matmul, scaled_row
from runtime_ref.weights import BlockMatrix

BLOCK = 32


def multiply(matrix: BlockMatrix, x: np.ndarray, activations: Activations) -> np.ndarray:
    """y [n] = matrix [n, k] times x [k], x in the same blocks."""
    q, q_scales = quantize(x, BLOCK, activations.levels)
    return integer_matmul(matrix.codes, matrix.scales, q, q_scales)


def row(matrix: BlockMatrix, token: int) -> np.ndarray:
    """One row in fp32 [k]."""
    return scaled_row(matrix.codes[token], matrix.scales[token])
