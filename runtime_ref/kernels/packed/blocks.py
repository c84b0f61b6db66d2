"""Values rounded in blocks of 32, eight and four bits each.

Q8: codes int8 [n/16, k/4, 16, 4]; byte j of step s holds column 4 s + j. Q4: codes uint8 [n/16, k/8, 16, 4]; byte j of step s holds
code + 8 of the columns 8 s + j (low bits) and 8 s + 4 + j (high bits). Scales fp16 bits [n/16, k/32, 16].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.packed import ROWS, Reader, Wanted, blank, filled_codes, finite, tiled
from runtime_ref.reference.blocks import BlockMatrix
from tmexport.types import GGMLType

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

_compiled = cached(nogil=True)


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
    packed = PackedQ8(blank((tiles, k // 4, ROWS, 4), np.int8), np.zeros((tiles, k // 32, ROWS), np.uint16))
    _unpack_q8(blocks, packed.codes.view(np.uint8), packed.scales)
    finite(packed.scales, name)
    return packed


def _q4(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedQ4:
    tiles = -(-len(blocks) // ROWS)
    packed = PackedQ4(blank((tiles, k // 8, ROWS, 4), np.uint8), np.zeros((tiles, k // 32, ROWS), np.uint16))
    packed.codes[-1] = 0x88
    _unpack_q4(blocks, packed.codes, packed.scales)
    finite(packed.scales, name)
    return packed


@_compiled
def _unpack_q8(blocks, codes, scales):
    for r in range(blocks.shape[0]):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(scales.shape[1]):
            base = block * 34
            scales[tile, block, lane] = np.uint16(row[base]) | np.uint16(np.uint16(row[base + 1]) << np.uint16(8))
            for step in range(8):
                target = codes[tile, block * 8 + step, lane]
                at = base + 2 + 4 * step
                target[0], target[1], target[2], target[3] = row[at], row[at + 1], row[at + 2], row[at + 3]


@_compiled
def _unpack_q4(blocks, codes, scales):
    columns = np.empty(32, np.uint8)
    for r in range(blocks.shape[0]):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(scales.shape[1]):
            base = block * 18
            scales[tile, block, lane] = np.uint16(row[base]) | np.uint16(np.uint16(row[base + 1]) << np.uint16(8))
            for at in range(16):
                columns[at] = row[base + 2 + at] & np.uint8(15)
                columns[at + 16] = row[base + 2 + at] >> np.uint8(4)
            for step in range(4):
                for j in range(4):
                    first = 8 * step + j
                    codes[tile, block * 4 + step, lane, j] = columns[first] | np.uint8(
                        columns[first + 4] << np.uint8(4)
                    )


PACK = {BlockMatrix: pack}
CODES: dict[GGMLType, Reader] = {}
VALUES = {GGMLType.Q8_0: _q8, GGMLType.Q4_0: _q4}
