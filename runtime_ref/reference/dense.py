"""Values as they are, fp16 or fp32; the activations are not rounded."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference.functions import sum16
from runtime_ref.weights import DenseMatrix


def multiply(matrix: DenseMatrix, x: np.ndarray, activations: Activations) -> np.ndarray:
    """y [n] = matrix [n, k] times x [k]."""
    return sum16(matrix.values.astype(np.float32) * x)


def row(matrix: DenseMatrix, token: int) -> np.ndarray:
    """One row in fp32 [k]."""
    return matrix.values[token].astype(np.float32)
