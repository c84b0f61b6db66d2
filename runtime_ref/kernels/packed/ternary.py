"""Codes -1, 0, 1 with a scale a group, of ternary and binary weights: two bits a weight.

codes uint8 [n/16, k/16, 16, 4]: the four bytes of (step s, row r) form one dword; bits 2i..2i+1 of its byte j hold code + 1 of
column 16 s + 4 i + j. Blocks of a file are checked on the way: codes 0..2, scales +0 or positive normal fp16, one scale a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.packed import ROWS, Blocks, Reader, Wanted, blank, filled_codes, parts, put, tiled
from runtime_ref.reference.ternary import TernaryMatrix
from tmexport.errors import GGUFError
from tmexport.types import GGMLType, decode_codes
from tmexport.types.base import bad_scales

_NIBBLES, _LOW_BITS = np.uint32(0x0F0F0F0F), np.uint32(0x55555555)
# dwords uint32 [of a block, blocks, rows], and whether all codes are valid
Words = Callable[[Blocks], tuple[np.ndarray, bool]]


class PackedTernary(NamedTuple):
    """codes uint8 [n/16, k/16, 16, 4], scales fp16 bits [n/16, k/group, 16]."""

    codes: np.ndarray
    scales: np.ndarray

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """As `packed.Packed` says."""
        tiles, groups = -(-n // ROWS), self.scales.shape[1] if self.scales.ndim == 3 else 0
        if groups < 1 or k % groups or block % 16 or (k // groups) % block:
            raise ValueError(f"{where}: {groups} groups and activation blocks of {block} do not divide rows of {k}")
        return [((tiles, k // 16, ROWS, 4), np.uint8), ((tiles, groups, ROWS), np.uint16)]


def pack(matrix: TernaryMatrix) -> PackedTernary:
    """A plain matrix in this layout."""
    codes = filled_codes(matrix.codes)
    n, k = codes.shape
    # [tile, row, step, i, j] -> [tile, step, row, j], the four i side by side in a byte
    fields = (codes + 1).astype(np.uint8).reshape(n // ROWS, ROWS, k // 16, 4, 4)
    packed = np.zeros((n // ROWS, ROWS, k // 16, 4), np.uint8)
    for i in range(4):
        packed |= fields[:, :, :, i] << (2 * i)
    return PackedTernary(np.ascontiguousarray(packed.transpose(0, 2, 1, 3)), tiled(matrix.scales))


def _reader(words: Words, *fields: tuple[str, str] | tuple[str, str, int]) -> Reader:
    """fields: of a block, its scale d and its numbers q."""
    block = np.dtype(list(fields))

    def read(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedTernary:
        assert group is not None
        tiles = -(-len(blocks) // ROWS)
        codes = blank((tiles, k // 16, ROWS), np.uint32)
        codes[-1] = 0x55555555  # rows beyond the last: code 0
        scales = np.zeros((tiles, k // group, ROWS), np.uint16)
        if not all([_put_rows(part, words, at, codes, scales) for at, part in parts(blocks, block)]):
            found, _ = decode_codes(blocks, kind, k, name)  # says which row and block
            if np.abs(found).max(initial=0) > 1:
                raise GGUFError(
                    f"{name}: holds codes beyond -1, 0 and 1, but the file records a group size of ternary weights"
                )
            raise GGUFError(f"{name}: scales differ inside a group of {group}; the recorded group size is wrong")
        return PackedTernary(codes.view(np.uint8).reshape(tiles, k // 16, ROWS, 4), scales)

    return read


def _put_rows(blocks: Blocks, words: Words, at: int, codes: np.ndarray, scales: np.ndarray) -> bool:
    """Some rows' blocks, from row `at`, in their places; False if codes or scales are not allowed."""
    found, ok = words(blocks)
    put(found, at, codes)
    bits = blocks.scales.reshape(scales.shape[1], -1, blocks.scales.shape[1])  # [groups, blocks of a group, rows]
    put(bits[None, :, 0], at, scales)
    return bool(ok and not bad_scales(bits).any() and (bits == bits[:, :1]).all())


def _swap(high: np.ndarray, low: np.ndarray, distance: int, mask: int) -> None:
    """The bits of `high` in the mask, moved up by a distance, and those of `low` in the mask trade places."""
    changed = (high >> np.uint32(distance) ^ low) & np.uint32(mask)
    low ^= changed
    high ^= changed << np.uint32(distance)


def _joined(fields: np.ndarray) -> np.ndarray:
    """Four dwords of bytes 0..3 [..., 4, blocks, rows] as one of four such fields a byte."""
    f = [fields[..., i, :, :] for i in range(4)]
    return f[0] | f[1] << np.uint32(2) | f[2] << np.uint32(4) | f[3] << np.uint32(6)


def _tq2(blocks: Blocks) -> tuple[np.ndarray, bool]:
    """In each half of 128 columns, byte m has columns m, m + 32, m + 64 and m + 96."""
    w = blocks.turned()
    ok = not (w & w >> np.uint32(1) & _LOW_BITS).any()  # both bits of a field: no code
    w = w.reshape(2, 2, 4, *w.shape[1:])
    # fields and dwords trade places: what was field s of dword i becomes field i of dword s
    for distance, mask, pairs in ((2, 0x33333333, ((0, 1), (2, 3))), (4, 0x0F0F0F0F, ((0, 2), (1, 3)))):
        for i, j in pairs:
            _swap(w[:, :, i], w[:, :, j], distance, mask)
    return w.transpose(0, 2, 1, 3, 4).reshape(16, *w.shape[3:]), ok


def _q2(blocks: Blocks) -> tuple[np.ndarray, bool]:
    """Byte i has columns 4 i .. 4 i + 3, lowest bits first; transposed, byte j has columns j, j + 4, j + 8, j + 12."""
    w = blocks.turned()
    ok = not (w & w >> np.uint32(1) & _LOW_BITS).any()
    for distance, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):
        changed = (w ^ w >> np.uint32(distance)) & np.uint32(mask)
        w ^= changed ^ changed << np.uint32(distance)
    return w, ok


def _tq1(blocks: Blocks) -> tuple[np.ndarray, bool]:
    """Base 3, the most significant of a byte's five digits first; the last four bytes have four, and a 0."""
    w = blocks.turned()
    ok = _WRITTEN[w.view(np.uint8)].all() and _WRITTEN_FOUR[w[12].view(np.uint8)].all()
    steps = np.zeros((16, *w.shape[1:]), np.uint32)
    rest = w.view(np.uint8)
    for place in range(5):
        digit = ((rest > 85).view(np.uint8) + (rest > 170).view(np.uint8)).view("<u4")
        words = _joined(digit[:12].reshape(3, 4, *w.shape[1:]))
        steps[2 * place], steps[2 * place + 1], steps[10 + place] = words
        if place < 4:
            steps[15] |= digit[12] << np.uint32(2 * place)
        rest = rest + rest + rest
    return steps, bool(ok)


def _q1(blocks: Blocks) -> tuple[np.ndarray, bool]:
    """Signs, a bit each: the codes -1 and 1 are stored as 0 and 2."""
    data = blocks.turned()
    return _SIGNS[data[::2]] | _SIGNS[data[1::2]] << np.uint32(4), True


def _q4_ternary(blocks: Blocks) -> tuple[np.ndarray, bool]:
    """Ternary codes with 8 added, in nibbles: columns 0..15 the low ones, 16..31 the high ones."""
    w = blocks.turned()
    codes = np.stack([w & _NIBBLES, w >> np.uint32(4) & _NIBBLES]).view(np.uint8) - np.uint8(7)
    return _joined(codes.view("<u4")), bool((codes <= 2).all())


def _written() -> tuple[np.ndarray, np.ndarray]:
    """For every byte, whether encoders write it for five digits, and for four and a 0."""
    five, four = np.zeros(256, bool), np.zeros(256, bool)
    for value in range(243):
        byte = -(-value * 256 // 243)
        five[byte], four[byte] = True, value % 3 == 0
    return five, four


def _signs() -> np.ndarray:
    """For every byte, its bits as the codes of 8 columns of a dword."""
    columns, values = np.arange(8), np.arange(256)
    places = 8 * (columns % 4) + 2 * (columns // 4) + 1
    return ((values[:, None] >> columns & 1) << places).sum(axis=1).astype(np.uint32)


_WRITTEN, _WRITTEN_FOUR = _written()
_SIGNS = _signs()


PACK = {TernaryMatrix: pack}
CODES = {
    GGMLType.TQ1_0: _reader(_tq1, ("q", "<u4", 13), ("d", "<u2")),
    GGMLType.TQ2_0: _reader(_tq2, ("q", "<u4", 16), ("d", "<u2")),
    GGMLType.Q2_0: _reader(_q2, ("d", "<u2"), ("q", "<u4", 4)),
    GGMLType.Q1_0: _reader(_q1, ("d", "<u2"), ("q", "u1", 16)),
    GGMLType.Q4_0: _reader(_q4_ternary, ("d", "<u2"), ("q", "<u4", 4)),
}
VALUES: dict[GGMLType, Reader] = {}
