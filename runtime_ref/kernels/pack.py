"""Matrices in the kernels' layout: 16 interleaved rows, so that each 32-bit lane of a vector owns one output row.

    PackedTernary  codes uint8 [n/16, k/16, 16, 4], scales fp16 bits [n/16, k/group, 16]
                   the four bytes of (step s, row r) form one dword; bits 2i..2i+1 of its byte j hold code + 1 of
                   column 16 s + 4 i + j
    PackedQ8       codes int8 [n/16, k/4, 16, 4], scales [n/16, k/32, 16]; byte j of step s holds column 4 s + j
    PackedQ4       codes uint8 [n/16, k/8, 16, 4], scales [n/16, k/32, 16]; byte j of step s holds code + 8 of the columns
                   8 s + j (low bits) and 8 s + 4 + j (high bits)
    PackedHalf, PackedFloat   values [n, k up to a multiple of 16], row-major

Rows are filled up to a multiple of 16 with zero codes and zero scales.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime_ref.weights import BlockMatrix, DenseMatrix, Matrix, TernaryMatrix

ROWS = 16


class PackedTernary(NamedTuple):
    codes: np.ndarray
    scales: np.ndarray


class PackedQ8(NamedTuple):
    codes: np.ndarray
    scales: np.ndarray


class PackedQ4(NamedTuple):
    codes: np.ndarray
    scales: np.ndarray


class PackedHalf(NamedTuple):
    values: np.ndarray


class PackedFloat(NamedTuple):
    values: np.ndarray


Packed = PackedTernary | PackedQ8 | PackedQ4 | PackedHalf | PackedFloat


def pack(matrix: Matrix) -> Packed:
    """`matrix` [n, k] in the kernels' layout."""
    if isinstance(matrix, DenseMatrix):
        return _pack_dense(matrix.values)
    n, k = matrix.codes.shape
    filled = -(-n // ROWS) * ROWS
    scales = np.zeros((filled, matrix.scales.shape[1]), np.float16)
    scales[:n] = matrix.scales
    scales = np.ascontiguousarray(scales.view(np.uint16).reshape(filled // ROWS, ROWS, -1).transpose(0, 2, 1))
    codes = np.zeros((filled, k), np.int8)
    codes[:n] = matrix.codes
    if isinstance(matrix, TernaryMatrix):
        # [tile, row, step, i, j] -> [tile, step, row, j], the four i side by side in a byte
        fields = (codes + 1).astype(np.uint8).reshape(filled // ROWS, ROWS, k // 16, 4, 4)
        packed = np.zeros((filled // ROWS, ROWS, k // 16, 4), np.uint8)
        for i in range(4):
            packed |= fields[:, :, :, i] << (2 * i)
        return PackedTernary(np.ascontiguousarray(packed.transpose(0, 2, 1, 3)), scales)
    assert isinstance(matrix, BlockMatrix)
    if matrix.bits == 8:
        grouped = codes.reshape(filled // ROWS, ROWS, k // 4, 4)
        return PackedQ8(np.ascontiguousarray(grouped.transpose(0, 2, 1, 3)), scales)
    fields = (codes + 8).astype(np.uint8).reshape(filled // ROWS, ROWS, k // 8, 2, 4)
    nibbles = fields[..., 0, :] | fields[..., 1, :] << 4
    return PackedQ4(np.ascontiguousarray(nibbles.transpose(0, 2, 1, 3)), scales)


def _pack_dense(values: np.ndarray) -> PackedHalf | PackedFloat:
    n, k = values.shape
    filled = np.zeros((n, -(-k // 16) * 16), values.dtype)
    filled[:, :k] = values
    return PackedHalf(filled.view(np.uint16)) if values.dtype == np.float16 else PackedFloat(filled)


def expect(packed: Packed, n: int, k: int, block: int, where: str) -> None:
    """Check a matrix [n, k] before native code reads it: every size and dtype it will rely on.

    Raises:
        ValueError: naming `where`.
    """
    tiles = -(-n // ROWS)
    if isinstance(packed, PackedHalf | PackedFloat):
        dtype = np.uint16 if isinstance(packed, PackedHalf) else np.float32
        wanted: list[tuple[tuple[int, ...], Any]] = [((n, -(-k // 16) * 16), dtype)]
    elif isinstance(packed, PackedTernary):
        groups = packed.scales.shape[1] if packed.scales.ndim == 3 else 0
        if groups < 1 or k % groups or block % 16 or (k // groups) % block:
            raise ValueError(f"{where}: {groups} groups and activation blocks of {block} do not divide rows of {k}")
        wanted = [((tiles, k // 16, ROWS, 4), np.uint8), ((tiles, groups, ROWS), np.uint16)]
    else:
        step, dtype = (4, np.int8) if isinstance(packed, PackedQ8) else (8, np.uint8)
        if k % 32 or block != 32:
            raise ValueError(f"{where}: rows of {k} in activation blocks of {block}; expected blocks of 32")
        wanted = [((tiles, k // step, ROWS, 4), dtype), ((tiles, k // 32, ROWS), np.uint16)]
    for array, (shape, dtype) in zip(packed, wanted, strict=True):
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{where}: holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}"
            )


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a cache line, its contents undefined."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(dtype).reshape(shape)
