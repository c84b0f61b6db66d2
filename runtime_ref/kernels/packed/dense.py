"""Values of fp16 and fp32 as they are: [n, k up to a multiple of 16], row-major."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.packed import Reader, Wanted, finite
from runtime_ref.reference.dense import DenseMatrix
from tmexport.types import GGMLType, decode_values


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


def _half(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedHalf:
    half = np.zeros((len(blocks), _sixteens(k)), np.uint16)
    half[:, :k] = blocks.view(np.uint16)
    finite(half, name)
    return PackedHalf(half)


def _float(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedFloat:
    values = np.zeros((len(blocks), _sixteens(k)), np.float32)
    values[:, :k] = decode_values(blocks, kind, k, name)
    return PackedFloat(values)


PACK = {DenseMatrix: pack}
CODES: dict[GGMLType, Reader] = {}
VALUES: dict[GGMLType, Reader] = {
    GGMLType.F16: _half,
    GGMLType.F32: _float,
    GGMLType.BF16: _float,
    GGMLType.Q4_1: _float,  # read, not made to be run: export it as int4 or int8
}
