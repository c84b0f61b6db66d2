"""Values of fp16 and fp32 as they are: [n, k up to a multiple of 16], row-major."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.packed import Reader, Wanted, finite
from runtime_ref.reference import dense
from runtime_ref.reference.dense import DenseMatrix
from tmexport.types import GGMLType


class PackedHalf(NamedTuple):
    """values: fp16 bits."""

    values: np.ndarray

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """As `packed.Packed` says."""
        return [((n, _sixteens(k)), np.uint16)]


class PackedFloat(NamedTuple):
    """values: fp32."""

    values: np.ndarray

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """As `packed.Packed` says."""
        return [((n, _sixteens(k)), np.float32)]


def _sixteens(k: int) -> int:
    return -(-k // 16) * 16


def pack(matrix: DenseMatrix) -> PackedHalf | PackedFloat:
    """A plain matrix in this layout."""
    n, k = matrix.values.shape
    filled = np.zeros((n, _sixteens(k)), matrix.values.dtype)
    filled[:, :k] = matrix.values
    return PackedHalf(filled.view(np.uint16)) if filled.dtype == np.float16 else PackedFloat(filled)


def _read(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedHalf | PackedFloat:
    """What the specification reads, in this layout."""
    packed = pack(dense.read(blocks, kind, k, group, name))
    if isinstance(packed, PackedHalf):
        finite(packed.values, name)
    return packed


PACK = {DenseMatrix: pack}
CODES: dict[GGMLType, Reader] = {}
VALUES: dict[GGMLType, Reader] = dict.fromkeys(dense.VALUES, _read)
