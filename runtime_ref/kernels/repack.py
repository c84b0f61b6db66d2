"""From a GGUF tensor's blocks straight to the kernels' layout (`pack.py`), without decoding to one byte a weight.

The blocks are checked on the way as `tmexport.types` checks them: codes 0..2, scales +0 or positive normal fp16,
one scale a group. All of it is numpy's, some rows at a time: compiled loops are no faster, and would have to be compiled before
the first token. A tile's codes are dwords of 16 columns of a row (8 in Q4_0, 4 in Q8_0), and a type is a function that makes
them of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.pack import ROWS, Packed, PackedFloat, PackedHalf, PackedQ4, PackedQ8, PackedTernary, aligned
from tmexport.errors import GGUFError
from tmexport.gguf.reader import GGUFFile
from tmexport.types import GGMLType, decode_codes, decode_values

_PART = 256 << 10  # bytes of blocks at a time
_NIBBLES, _LOW_BITS = np.uint32(0x0F0F0F0F), np.uint32(0x55555555)
_FIELDS = {
    GGMLType.TQ1_0: np.dtype([("q", "<u4", 13), ("d", "<u2")]),
    GGMLType.TQ2_0: np.dtype([("q", "<u4", 16), ("d", "<u2")]),
    GGMLType.Q2_0: np.dtype([("d", "<u2"), ("q", "<u4", 4)]),
    GGMLType.Q1_0: np.dtype([("d", "<u2"), ("q", "u1", 16)]),
    GGMLType.Q4_0: np.dtype([("d", "<u2"), ("q", "<u4", 4)]),
    GGMLType.Q8_0: np.dtype([("d", "<u2"), ("q", "<u4", 8)]),
}


class Blocks(NamedTuple):
    """Of some rows: data uint32 or uint8 [rows, blocks, numbers of a block], scales' bits uint16 [blocks, rows]."""

    data: np.ndarray
    scales: np.ndarray

    def dwords(self) -> np.ndarray:
        """A copy of the data [numbers of a block, blocks, rows]."""
        return np.ascontiguousarray(self.data.transpose(2, 1, 0))


Made = tuple[np.ndarray, bool]  # dwords uint32 [of a block, blocks, rows], and whether all codes are valid
Codes = Callable[[Blocks], Made]


def read_packed(gguf: GGUFFile, name: str, group: int | None) -> Packed:
    """One weight matrix of a file in the kernels' layout.

    Raises:
        GGUFError: damaged blocks, or scales that differ inside a group; row and block are named.
    """
    info = gguf.tensors[name]
    return pack_blocks(gguf.blocks(name), info.type, info.shape[-1], group, name)


def pack_blocks(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> Packed:
    """`read_packed` for the blocks uint8 [n, bytes of a row] of a matrix [n, k]; `name` is for messages.

    Raises: as `read_packed`.
    """
    if group is not None:
        return _pack_codes(blocks, kind, k, group, name)
    if kind not in _VALUES:
        raise GGUFError(f"{name}: is {kind.name}, which this runtime cannot multiply as values")
    return _VALUES[kind](blocks, kind, k, name)


def _pack_codes(blocks: np.ndarray, kind: GGMLType, k: int, group: int, name: str) -> PackedTernary:
    """Codes -1, 0, 1 of any kind: two bits a weight, and the scales joined to groups."""
    if kind not in _CODES:
        raise GGUFError(f"{name}: is {kind.name}, which this runtime cannot multiply as codes")
    tiles = -(-len(blocks) // ROWS)
    codes = _blank((tiles, k // 16, ROWS), np.uint32)
    codes[-1] = 0x55555555  # rows beyond the last: code 0
    scales = np.zeros((tiles, k // group, ROWS), np.uint16)
    if not all([_put_codes(part, _CODES[kind], at, codes, scales) for at, part in _parts(blocks, kind)]):
        found, _ = decode_codes(blocks, kind, k, name)  # says which row and block
        if np.abs(found).max(initial=0) > 1:
            raise GGUFError(
                f"{name}: holds codes beyond -1, 0 and 1, but the file records a group size of ternary weights"
            )
        raise GGUFError(f"{name}: scales differ inside a group of {group}; the recorded group size is wrong")
    return PackedTernary(codes.view(np.uint8).reshape(tiles, k // 16, ROWS, 4), scales)


def _put_codes(blocks: Blocks, kind: Codes, at: int, codes: np.ndarray, scales: np.ndarray) -> bool:
    """Some rows' blocks, from row `at`, in their places; False if codes or scales are not allowed."""
    words, ok = kind(blocks)
    _put(words, at, codes)
    bits = blocks.scales
    grouped = bits.reshape(scales.shape[1], -1, bits.shape[1])
    _put(grouped[None, :, 0], at, scales)
    allowed = (bits == 0) | ((bits >= 0x0400) & (bits < 0x7C00))
    return bool(ok and allowed.all() and (grouped == grouped[:, :1]).all())


def _put(values: np.ndarray, at: int, tiles: np.ndarray) -> None:
    """values [steps of a block, blocks, rows], from row `at` (a multiple of 16), in tiles [n / 16, all steps, 16]."""
    steps, blocks, rows = values.shape
    first, whole = at // ROWS, rows // ROWS
    by_block = tiles.reshape(len(tiles), blocks, steps, ROWS)
    tiled = values[:, :, : whole * ROWS].reshape(steps, blocks, whole, ROWS)
    by_block[first : first + whole] = tiled.transpose(2, 1, 0, 3)
    if rows % ROWS:
        by_block[first + whole, :, :, : rows % ROWS] = values[:, :, whole * ROWS :].transpose(1, 0, 2)


def _parts(blocks: np.ndarray, kind: GGMLType) -> Iterator[tuple[int, Blocks]]:
    """Some rows at a time, few enough for the processor's cache, and the number of the first one."""
    rows = max(1, _PART // (ROWS * max(1, blocks.shape[1]))) * ROWS
    for at in range(0, len(blocks), rows):
        part = blocks[at : at + rows].view(_FIELDS[kind])
        yield at, Blocks(part["q"], np.ascontiguousarray(part["d"].T))


def _pack_q8(blocks: np.ndarray, kind: GGMLType, k: int, name: str) -> PackedQ8:
    tiles = -(-len(blocks) // ROWS)
    codes, scales = _blank((tiles, k // 4, ROWS), np.uint32), np.zeros((tiles, k // 32, ROWS), np.uint16)
    for at, part in _parts(blocks, kind):
        _put(part.data.transpose(2, 1, 0), at, codes)
        _put(part.scales[None], at, scales)
    _finite(scales, name)
    return PackedQ8(codes.view(np.int8).reshape(tiles, k // 4, ROWS, 4), scales)


def _pack_q4(blocks: np.ndarray, kind: GGMLType, k: int, name: str) -> PackedQ4:
    tiles = -(-len(blocks) // ROWS)
    codes, scales = _blank((tiles, k // 8, ROWS), np.uint32), np.zeros((tiles, k // 32, ROWS), np.uint16)
    codes[-1] = 0x88888888
    for at, part in _parts(blocks, kind):
        w = part.dwords()  # low nibbles: columns 0..15, high ones: 16..31
        low = (w[::2] & _NIBBLES) | (w[1::2] & _NIBBLES) << np.uint32(4)
        high = (w[::2] >> np.uint32(4) & _NIBBLES) | (w[1::2] & ~_NIBBLES)
        _put(np.concatenate([low, high]), at, codes)
        _put(part.scales[None], at, scales)
    _finite(scales, name)
    return PackedQ4(codes.view(np.uint8).reshape(tiles, k // 8, ROWS, 4), scales)


def _pack_half(blocks: np.ndarray, kind: GGMLType, k: int, name: str) -> PackedHalf:
    half = np.zeros((len(blocks), -(-k // 16) * 16), np.uint16)
    half[:, :k] = blocks.view(np.uint16)
    _finite(half, name)
    return PackedHalf(half)


def _pack_float(blocks: np.ndarray, kind: GGMLType, k: int, name: str) -> PackedFloat:
    values = np.zeros((len(blocks), -(-k // 16) * 16), np.float32)
    values[:, :k] = decode_values(blocks, kind, k, name)
    return PackedFloat(values)


def _finite(bits: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite fp16 (all bits of the exponent set)."""
    if ((bits & np.uint16(0x7C00)) == 0x7C00).any():
        raise GGUFError(f"{name}: holds NaN or infinite values; the file is damaged")


def _blank(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Room for a large matrix on a cache line; only the last tile, which may have rows to spare, is cleared."""
    array = aligned(shape, np.dtype(dtype))
    array[-1] = 0
    return array


def _swap(high: np.ndarray, low: np.ndarray, distance: int, mask: int) -> None:
    """The bits of `high` in the mask, moved up by a distance, and those of `low` in the mask trade places."""
    changed = (high >> np.uint32(distance) ^ low) & np.uint32(mask)
    low ^= changed
    high ^= changed << np.uint32(distance)


def _joined(fields: np.ndarray) -> np.ndarray:
    """Four dwords of bytes 0..3 [..., 4, blocks, rows] as one of four such fields a byte."""
    f = [fields[..., i, :, :] for i in range(4)]
    return f[0] | f[1] << np.uint32(2) | f[2] << np.uint32(4) | f[3] << np.uint32(6)


def _tq2(blocks: Blocks) -> Made:
    """In each half of 128 columns, byte m has columns m, m + 32, m + 64 and m + 96."""
    w = blocks.dwords()
    ok = not (w & w >> np.uint32(1) & _LOW_BITS).any()  # both bits of a field: no code
    w = w.reshape(2, 2, 4, *w.shape[1:])
    # fields and dwords trade places: what was field s of dword i becomes field i of dword s
    for distance, mask, pairs in ((2, 0x33333333, ((0, 1), (2, 3))), (4, 0x0F0F0F0F, ((0, 2), (1, 3)))):
        for i, j in pairs:
            _swap(w[:, :, i], w[:, :, j], distance, mask)
    return w.transpose(0, 2, 1, 3, 4).reshape(16, *w.shape[3:]), ok


def _q2(blocks: Blocks) -> Made:
    """Byte i has columns 4 i .. 4 i + 3, lowest bits first; transposed, byte j has columns j, j + 4, j + 8, j + 12."""
    w = blocks.dwords()
    ok = not (w & w >> np.uint32(1) & _LOW_BITS).any()
    for distance, mask in ((6, 0x00CC00CC), (12, 0x0000F0F0)):
        changed = (w ^ w >> np.uint32(distance)) & np.uint32(mask)
        w ^= changed ^ changed << np.uint32(distance)
    return w, ok


def _tq1(blocks: Blocks) -> Made:
    """Base 3, the most significant of a byte's five digits first; the last four bytes have four, and a 0."""
    w = blocks.dwords()
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


def _q1(blocks: Blocks) -> Made:
    """Signs, a bit each: the codes -1 and 1 are stored as 0 and 2."""
    data = blocks.dwords()
    return _SIGNS[data[::2]] | _SIGNS[data[1::2]] << np.uint32(4), True


def _q4_ternary(blocks: Blocks) -> Made:
    """Ternary codes with 8 added, in nibbles: columns 0..15 the low ones, 16..31 the high ones."""
    w = blocks.dwords()
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


_CODES: dict[GGMLType, Codes] = {
    GGMLType.TQ1_0: _tq1,
    GGMLType.TQ2_0: _tq2,
    GGMLType.Q2_0: _q2,
    GGMLType.Q1_0: _q1,
    GGMLType.Q4_0: _q4_ternary,
}
_VALUES: dict[GGMLType, Callable[[np.ndarray, GGMLType, int, str], Packed]] = {
    GGMLType.Q8_0: _pack_q8,
    GGMLType.Q4_0: _pack_q4,
    GGMLType.F16: _pack_half,
    GGMLType.F32: _pack_float,
    GGMLType.BF16: _pack_float,
    GGMLType.Q4_1: _pack_float,  # read, not made to be run: export it as int4 or int8
}
