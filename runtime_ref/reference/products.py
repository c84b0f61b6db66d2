"""Products of a matrix and one token's activations, and embedding rows: by the rule of the matrix's type, a file a type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference import blocks, dense, ternary
from runtime_ref.weights import BlockMatrix, DenseMatrix, Matrix, TernaryMatrix

_RULES: dict[type, Any] = {TernaryMatrix: ternary, BlockMatrix: blocks, DenseMatrix: dense}


def matmul(matrix: Matrix, x: np.ndarray, activations: Activations) -> np.ndarray:
    """y [n] = matrix [n, k] times x [k]."""
    multiply: Callable[..., np.ndarray] = _RULES[type(matrix)].multiply
    with np.errstate(invalid="ignore"):
        return multiply(matrix, x, activations)


def embed(matrix: Matrix, token: int) -> np.ndarray:
    """Row `token` of the embedding in fp32 [d]."""
    row: np.ndarray = _RULES[type(matrix)].row(matrix, token)
    return row
