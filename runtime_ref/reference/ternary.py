"""Codes -1, 0, 1 with a scale a group; binary weights are such codes without zeros."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference.functions import quantize
from runtime_ref.reference.integers import integer_matmul, scaled_row
from runtime_ref.weights import TernaryMatrix


def multiply(matrix: TernaryMatrix, x: np.ndarray, activations: Activations) -> np.ndarray:
    """y [n] = matrix [n, k] times x [k], x in blocks of the group (exact) or of the container's partner (fast)."""
    q, q_scales = quantize(x, activations.block(matrix.group, matrix.fast_block), activations.levels)
    return integer_matmul(matrix.codes, matrix.scales, q, q_scales)


def row(matrix: TernaryMatrix, token: int) -> np.ndarray:
    """One row in fp32 [k]."""
    return scaled_row(matrix.codes[token], matrix.scales[token])
