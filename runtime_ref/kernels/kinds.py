"""The kinds of weights that the kernels multiply, put together: a line here for each, with its file here and one in `packed`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from runtime_ref.kernels import blocks, dense, ternary
from runtime_ref.kernels.packed import Packed, Reader
from runtime_ref.kernels.packed import blocks as packed_blocks
from runtime_ref.kernels.packed import dense as packed_dense
from runtime_ref.kernels.packed import ternary as packed_ternary
from runtime_ref.weights import Matrix
from tmexport.errors import GGUFError
from tmexport.gguf.reader import GGUFFile
from tmexport.types import GGMLType

KINDS: tuple[tuple[Any, Any], ...] = ((ternary, packed_ternary), (blocks, packed_blocks), (dense, packed_dense))


def _all(*tables: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for table in tables for key, value in table.items()}


PRODUCTS: dict[type, Callable[..., Any]] = _all(*(kernel.PRODUCTS for kernel, _ in KINDS))
EMBEDDINGS: dict[type, Callable[..., Any]] = _all(*(kernel.EMBEDDINGS for kernel, _ in KINDS))
UNQUANTISED = tuple(kind for kernel, _ in KINDS for kind in kernel.UNQUANTISED)
_PACK: dict[type, Callable[[Any], Packed]] = _all(*(layout.PACK for _, layout in KINDS))
_CODES: dict[GGMLType, Reader] = _all(*(layout.CODES for _, layout in KINDS))
_VALUES: dict[GGMLType, Reader] = _all(*(layout.VALUES for _, layout in KINDS))


def pack(matrix: Matrix) -> Packed:
    """`matrix` [n, k] in the kernels' layout."""
    return _PACK[type(matrix)](matrix)


def read_packed(gguf: GGUFFile, name: str, group: int | None) -> Packed:
    """One weight matrix of a file in the kernels' layout; group: of a tensor that holds codes, None for values.

    Raises:
        GGUFError: damaged blocks, or scales that differ inside a group; row and block are named.
    """
    info = gguf.tensors[name]
    return pack_blocks(gguf.blocks(name), info.type, info.shape[-1], group, name)


def pack_blocks(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> Packed:
    """`read_packed` for the blocks uint8 [n, bytes of a row] of a matrix [n, k]; `name` is for messages.

    Raises: as `read_packed`.
    """
    table, what = (_VALUES, "values") if group is None else (_CODES, "codes")
    if kind not in table:
        raise GGUFError(f"{name}: is {kind.name}, which this runtime cannot multiply as {what}")
    return table[kind](blocks, kind, k, group, name)
