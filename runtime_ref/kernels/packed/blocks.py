"""Values rounded in blocks of 32, eight and four bits each.

Q8: codes int8 [n/16, k/4, 16, 4]; byte j of step s holds column 4 s + j. Q4: codes uint8 [n/16, k/8, 16, 4]; byte j of step s holds
code + 8 of the columns 8 s + j (low bits) and 8 s + 4 + j (high bits). Scales fp16 bits [n/16, k/32, 16].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.packed import ROWS, Reader, Wanted, blank, filled_codes, finite, parts, put, tiled
from runtime_ref.reference.blocks import BlockMatrix
from tmexport.types import GGMLType

_NIBBLES = np.uint32(0x0F0F0F0F)
_Q8, _Q4 = np.dtype([("d", "<u2"), ("q", "<u4", 8)]), np.dtype([("d", "<u2"), ("q", "<u4", 4)])


class PackedQ8(NamedTuple):
    """codes int8 [n/16, k/4, 16, 4], scales fp16 bits [n/16, k/32, 16]."""

    codes: np.ndarray
    scales: np.ndarray

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """As `packed.Packed` says."""
        return _wanted(n, k, block, where, 4, np.int8)


class PackedQ4(NamedTuple):
    """codes uint8 [n/16, k/8, 16, 4], scales fp16 bits [n/16, k/32, 16]."""

    codes: np.ndarray
    scales: np.ndarray

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """As `packed.Packed` says."""
        return _wanted(n, k, block, where, 8, np.uint8)


def _wanted(n: int, k: int, block: int, where: str, step: int, dtype: type) -> Wanted:
    if k % 32 or block != 32:
        raise ValueError(f"{where}: rows of {k} in activation blocks of {block}; expected blocks of 32")
    tiles = -(-n // ROWS)
    return [((tiles, k // step, ROWS, 4), dtype), ((tiles, k // 32, ROWS), np.uint16)]


def pack(matrix: BlockMatrix) -> PackedQ8 | PackedQ4:
    """A plain matrix in this layout."""
    codes = filled_codes(matrix.codes)
    n, k = codes.shape
    if matrix.bits == 8:
        grouped = codes.reshape(n // ROWS, ROWS, k // 4, 4)
        return PackedQ8(np.ascontiguousarray(grouped.transpose(0, 2, 1, 3)), tiled(matrix.scales))
    fields = (codes + 8).astype(np.uint8).reshape(n // ROWS, ROWS, k // 8, 2, 4)
    nibbles = fields[..., 0, :] | fields[..., 1, :] << 4
    return PackedQ4(np.ascontiguousarray(nibbles.transpose(0, 2, 1, 3)), tiled(matrix.scales))


def _q8(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedQ8:
    tiles = -(-len(blocks) // ROWS)
    codes, scales = blank((tiles, k // 4, ROWS), np.uint32), np.zeros((tiles, k // 32, ROWS), np.uint16)
    for at, part in parts(blocks, _Q8):
        put(part.data.transpose(2, 1, 0), at, codes)
        put(part.scales[None], at, scales)
    finite(scales, name)
    return PackedQ8(codes.view(np.int8).reshape(tiles, k // 4, ROWS, 4), scales)


def _q4(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedQ4:
    tiles = -(-len(blocks) // ROWS)
    codes, scales = blank((tiles, k // 8, ROWS), np.uint32), np.zeros((tiles, k // 32, ROWS), np.uint16)
    codes[-1] = 0x88888888
    for at, part in parts(blocks, _Q4):
        w = part.turned()  # low nibbles: columns 0..15, high ones: 16..31
        low = (w[::2] & _NIBBLES) | (w[1::2] & _NIBBLES) << np.uint32(4)
        high = (w[::2] >> np.uint32(4) & _NIBBLES) | (w[1::2] & ~_NIBBLES)
        put(np.concatenate([low, high]), at, codes)
        put(part.scales[None], at, scales)
    finite(scales, name)
    return PackedQ4(codes.view(np.uint8).reshape(tiles, k // 8, ROWS, 4), scales)


PACK = {BlockMatrix: pack}
CODES: dict[GGMLType, Reader] = {}
VALUES = {GGMLType.Q8_0: _q8, GGMLType.Q4_0: _q4}
