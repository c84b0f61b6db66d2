"""From a GGUF tensor's blocks straight to the kernels' layout (`pack.py`), without decoding to one byte a weight.

The blocks are checked on the way as `tmexport.types` checks them: codes 0..2, scales +0 or positive normal fp16,
one scale a group.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.pack import ROWS, Packed, PackedFloat, PackedHalf, PackedQ4, PackedQ8, PackedTernary, aligned
from tmexport.errors import GGUFError
from tmexport.gguf.reader import GGUFFile
from tmexport.types import GGMLType, decode_codes, decode_values

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

_FIELDS = np.uint32(0x03030303)
_compiled = cached(nogil=True)


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
    if not _CODES[kind](blocks, codes, scales):
        found, _ = decode_codes(blocks, kind, k, name)  # says which row and block
        if np.abs(found).max(initial=0) > 1:
            raise GGUFError(
                f"{name}: holds codes beyond -1, 0 and 1, but the file records a group size of ternary weights"
            )
        raise GGUFError(f"{name}: scales differ inside a group of {group}; the recorded group size is wrong")
    return PackedTernary(codes.view(np.uint8).reshape(tiles, k // 16, ROWS, 4), scales)


def _pack_q8(blocks: np.ndarray, kind: GGMLType, k: int, name: str) -> PackedQ8:
    tiles = -(-len(blocks) // ROWS)
    packed = PackedQ8(_blank((tiles, k // 4, ROWS, 4), np.int8), np.zeros((tiles, k // 32, ROWS), np.uint16))
    _q8(blocks, packed.codes.view(np.uint8), packed.scales)
    _finite(packed.scales, name)
    return packed


def _pack_q4(blocks: np.ndarray, kind: GGMLType, k: int, name: str) -> PackedQ4:
    tiles = -(-len(blocks) // ROWS)
    packed = PackedQ4(_blank((tiles, k // 8, ROWS, 4), np.uint8), np.zeros((tiles, k // 32, ROWS), np.uint16))
    packed.codes[-1] = 0x88
    _q4(blocks, packed.codes, packed.scales)
    _finite(packed.scales, name)
    return packed


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


@_compiled
def _word(row, at):
    return (
        np.uint32(row[at])
        | np.uint32(row[at + 1]) << np.uint32(8)
        | np.uint32(row[at + 2]) << np.uint32(16)
        | np.uint32(row[at + 3]) << np.uint32(24)
    )


@_compiled
def _put_scale(row, at, scales, tile, lane, block, blocks):
    """Store the fp16 at row[at:] as the scale of its group; False if it is not allowed, or differs inside the group."""
    bits = np.uint16(row[at]) | np.uint16(np.uint16(row[at + 1]) << np.uint16(8))
    if bits != 0 and (bits < 0x0400 or bits >= 0x7C00):
        return False
    per_group = blocks // scales.shape[1]
    if block % per_group == 0:
        scales[tile, block // per_group, lane] = bits
        return True
    return scales[tile, block // per_group, lane] == bits


@_compiled
def _tq2(blocks, codes, scales):
    n, count = blocks.shape[0], codes.shape[1] // 16
    ok = True
    for r in range(n):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(count):
            base = block * 66
            seen = np.uint32(0)
            for step in range(16):
                at = base + 32 * (step // 8) + 16 * (step % 2)
                shift = np.uint32(2 * (step % 8 // 2))
                word = np.uint32(0)
                for i in range(4):
                    fields = (_word(row, at + 4 * i) >> shift) & np.uint32(0x03030303)
                    word |= fields << np.uint32(2 * i)
                codes[tile, block * 16 + step, lane] = word
                seen |= word & (word >> np.uint32(1)) & np.uint32(0x55555555)
            ok &= seen == 0 and _put_scale(row, base + 64, scales, tile, lane, block, count)
    return ok


@_compiled
def _q2(blocks, codes, scales):
    n, count = blocks.shape[0], codes.shape[1] // 4
    ok = True
    for r in range(n):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(count):
            base = block * 18
            seen = np.uint32(0)
            for step in range(4):
                source = _word(row, base + 2 + 4 * step)  # byte i: columns 4i.., 2 bits each; transposed below
                word = np.uint32(0)
                for i in range(4):
                    byte = (source >> np.uint32(8 * i)) & np.uint32(0xFF)
                    spread = (byte | byte << np.uint32(12)) & np.uint32(0x000F000F)
                    spread = (spread | spread << np.uint32(6)) & np.uint32(0x03030303)
                    word |= spread << np.uint32(2 * i)
                codes[tile, block * 4 + step, lane] = word
                seen |= word & (word >> np.uint32(1)) & np.uint32(0x55555555)
            ok &= seen == 0 and _put_scale(row, base, scales, tile, lane, block, count)
    return ok


def _base3_table() -> np.ndarray:
    """For every byte, its five base-3 digits in bytes 0..4 of a uint64; byte 7 is 1 if no encoder writes that byte."""
    table = np.zeros(256, np.uint64)
    for byte in range(256):
        digits = [byte * 3**p % 256 * 3 // 256 for p in range(5)]
        value = sum(d * 3 ** (4 - p) for p, d in enumerate(digits))
        packed = sum(d << (8 * p) for p, d in enumerate(digits))
        table[byte] = packed | ((-(-value * 256 // 243) != byte) << 56)
    return table


_BASE3 = _base3_table()


@_compiled
def _tq1_by(blocks, codes, scales, table):
    n, count = blocks.shape[0], codes.shape[1] // 16
    digits = np.empty(256, np.uint32)
    ok = True
    for r in range(n):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(count):
            base = block * 54
            bad = np.uint64(0)
            for at in range(52):
                entry = table[row[base + at]]
                bad |= entry >> np.uint64(56)
                if at >= 48:  # four digits, padded with a 0
                    bad |= (entry >> np.uint64(32)) & np.uint64(3)
                first, stride, held = (
                    (at, 32, 5) if at < 32 else (160 + at - 32, 16, 5) if at < 48 else (240 + at - 48, 4, 4)
                )
                for position in range(held):
                    digits[first + position * stride] = np.uint32((entry >> np.uint64(8 * position)) & np.uint64(3))
            for step in range(16):
                word = np.uint32(0)
                for i in range(4):
                    for j in range(4):
                        word |= digits[16 * step + 4 * i + j] << np.uint32(8 * j + 2 * i)
                codes[tile, block * 16 + step, lane] = word
            ok &= bad == 0 and _put_scale(row, base + 52, scales, tile, lane, block, count)
    return ok


@_compiled
def _q8(blocks, codes, scales):
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
def _q4(blocks, codes, scales):
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


@_compiled
def _q1(blocks, codes, scales):
    """Signs, a bit each: the codes -1 and 1 are stored as 0 and 2."""
    n, count = blocks.shape[0], codes.shape[1] // 8
    ok = True
    for r in range(n):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(count):
            base = block * 18
            for step in range(8):
                word = np.uint32(0)
                for half in range(2):
                    byte = np.uint32(row[base + 2 + 2 * step + half])
                    for bit in range(8):
                        column = 8 * half + bit
                        place = np.uint32(8 * (column % 4) + 2 * (column // 4) + 1)
                        word |= ((byte >> np.uint32(bit)) & np.uint32(1)) << place
                codes[tile, block * 8 + step, lane] = word
            ok &= _put_scale(row, base, scales, tile, lane, block, count)
    return ok


@_compiled
def _q4_ternary(blocks, codes, scales):
    """Ternary codes with 8 added, in nibbles."""
    n, count = blocks.shape[0], codes.shape[1] // 2
    ok = True
    for r in range(n):
        tile, lane, row = r // 16, r % 16, blocks[r]
        for block in range(count):
            base = block * 18
            for step in range(2):  # columns 0..15 are the low nibbles, 16..31 the high ones
                word = np.uint32(0)
                for column in range(16):
                    code = (np.uint32(row[base + 2 + column]) >> np.uint32(4 * step)) & np.uint32(15)
                    ok &= 7 <= code <= 9
                    word |= ((code - np.uint32(7)) & np.uint32(3)) << np.uint32(8 * (column % 4) + 2 * (column // 4))
                codes[tile, block * 2 + step, lane] = word
            ok &= _put_scale(row, base, scales, tile, lane, block, count)
    return ok


def _tq1(blocks: np.ndarray, codes: np.ndarray, scales: np.ndarray) -> bool:
    return _tq1_by(blocks, codes, scales, _BASE3)


_CODES = {
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
