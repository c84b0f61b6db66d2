"""Products of a matrix and one token's activations, and embedding rows: by the rule of the matrix's kind, a file a kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference import blocks, dense, ternary
from runtime_ref.weights import Matrix, Reader
from tmexport.errors import GGUFError
from tmexport.types import GGMLType

MODULES: tuple[Any, ...] = (ternary, blocks, dense)


def matmul(matrix: Matrix, x: np.ndarray, activations: Activations) -> np.ndarray:
    """y [n] = matrix [n, k] times x [k]."""
    with np.errstate(invalid="ignore"):
        return matrix.multiply(x, activations)


def read_blocks(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> Matrix:
    """A tensor as a matrix (`weights.Reader`).

    Raises:
        GGUFError: damaged blocks, a type that this runtime does not multiply so, or scales that differ inside a group.
    """
    module = _module(kind, group, name)
    read: Reader = (module.VALUES if group is None else module.CODES)[kind]
    return read(blocks, kind, k, group, name)


def activation_block(kind: GGMLType, group: int | None, activations: Activations, name: str) -> int:
    """How many activations share a scale when multiplied with such a tensor. Raises: as `read_blocks`."""
    block: int = _module(kind, group, name).activation_block(kind, group, activations)
    return block


def _module(kind: GGMLType, group: int | None, name: str) -> Any:
    for module in MODULES:
        if kind in (module.VALUES if group is None else module.CODES):
            return module
    what = "values" if group is None else "codes"
    raise GGUFError(f"{name}: is {kind.name}, which this runtime cannot multiply as {what}")
