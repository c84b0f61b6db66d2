"""Codes -1, 0, 1 with a scale a group, of ternary and binary weights: two bits a weight.

codes uint8 [n/16, k/16, 16, 4]: the four bytes of (step s, row r) form one dword; bits 2i..2i+1 of its byte j hold code + 1 of
column 16 s + 4 i + j. Blocks of a file are checked on the way: codes 0..2, scales +0 or positive normal fp16, one scale a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.packed import ROWS, Reader, Wanted, blank, filled_codes, tiled
from runtime_ref.reference.ternary import TernaryMatrix
from tmexport.errors import GGUFError
from tmexport.types import GGMLType, decode_codes
from tmexport.types.base import INFINITE_BITS, SCALE_BITS

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

_compiled = cached(nogil=True)


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


def _reader(unpack: Callable[[np.ndarray, np.ndarray, np.ndarray], bool]) -> Reader:
    """`unpack(blocks, codes uint32 [n/16, k/16, 16], scales)` fills both; False if something in the blocks is not allowed."""

    def read(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> PackedTernary:
        assert group is not None
        tiles = -(-len(blocks) // ROWS)
        codes = blank((tiles, k // 16, ROWS), np.uint32)
        codes[-1] = 0x55555555  # rows beyond the last: code 0
        scales = np.zeros((tiles, k // group, ROWS), np.uint16)
        if not unpack(blocks, codes, scales):
            found, _ = decode_codes(blocks, kind, k, name)  # says which row and block
            if np.abs(found).max(initial=0) > 1:
                raise GGUFError(
                    f"{name}: holds codes beyond -1, 0 and 1, but the file records a group size of ternary weights"
                )
            raise GGUFError(f"{name}: scales differ inside a group of {group}; the recorded group size is wrong")
        return PackedTernary(codes.view(np.uint8).reshape(tiles, k // 16, ROWS, 4), scales)

    return read


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
    if bits != 0 and (bits < SCALE_BITS or bits >= INFINITE_BITS):  # `types.base.bad_scales`
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


PACK = {TernaryMatrix: pack}
CODES = {
    GGMLType.TQ1_0: _reader(_tq1),
    GGMLType.TQ2_0: _reader(_tq2),
    GGMLType.Q2_0: _reader(_q2),
    GGMLType.Q1_0: _reader(_q1),
    GGMLType.Q4_0: _reader(_q4_ternary),
}
VALUES: dict[GGMLType, Reader] = {}
