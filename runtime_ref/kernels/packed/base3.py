"""Ternary codes in base 3, 54 bytes for 256 columns where `packed.ternary` takes 64: what large matrices are multiplied from at decode.

A triple is three codes, code + 1 as digits of a number below 27 (5 bits). Twelve columns c..c + 11 are four triples: c, c + 1, c + 2; the fourth of each
quad, c + 3, c + 7, c + 11; c + 4, c + 5, c + 6; c + 8, c + 9, c + 10. What a block of activations leaves over is one or two quads; digits
without a column are 1. Eight triples x are five bytes, three are two:

    b0 = x0 | x2 low 3 bits << 5    b1 = x1 | x2 high 2 bits << 5 | x7 bit 3 << 7
    b2 = x3 | x5 low 3 bits << 5    b3 = x4 | x5 high 2 bits << 5 | x7 bit 4 << 7    b4 = x6 | x7 low 3 bits << 5

A tile is 64 rows side by side: lane 4 i + j of a vector of bytes is row 16 j + i, so that a dword has a row of each of four tiles of 16.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.arithmetic import Activations, Int8
from runtime_ref.kernels.cpu import features
from runtime_ref.kernels.isa import PRIMITIVES, Isa
from runtime_ref.kernels.packed import Packed, Wanted, aligned
from runtime_ref.kernels.packed.ternary import PackedTernary, swap, turned_fields

ROWS = 64  # of a tile
BLOCKS = (32, 64, 128, 256)  # columns that share a scale of activations
FEWEST = 1 << 23  # weights, 2 MB in two bits: smaller matrices come from a cache, where two bits are as fast or faster
NEEDS = ("avx512vbmi", "gfni")  # of the CPU: bytes permuted, and turned bit by bit
_PART = 1 << 20  # weights packed at a time


class PackedBase3(NamedTuple):
    """codes uint8 [k/block, n/64, bytes of a block, 64], scales fp16 bits [k/group, n/64, 64 rows]."""

    codes: np.ndarray
    scales: np.ndarray

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """As `packed.Packed` says."""
        tiles, groups = -(-n // ROWS), self.scales.shape[0] if self.scales.ndim == 3 else 0
        if groups < 1 or k % groups or block not in BLOCKS or (k // groups) % block:
            raise ValueError(f"{where}: {groups} groups and activation blocks of {block} do not divide rows of {k}")
        return [((k // block, tiles, n_bytes(block), ROWS), np.uint8), ((groups, tiles, ROWS), np.uint16)]


def n_triples(block: int) -> int:
    """Of a block of 32, 64, 128 or 256 columns: three columns each, and one that has what is left."""
    return -(-block // 3)


def n_bytes(block: int) -> int:
    """Of a row's block: five for eight triples, and two for three (what is left over is three or six)."""
    groups, left = divmod(n_triples(block), 8)
    return 5 * groups + left // 3 * 2


def suits(isa: Isa, activations: Activations, packed: Packed, block: int) -> bool:
    """The rule for which matrices are kept so: ternary ones of FEWEST weights and more, where the kernels have the instructions.

    With activations in bytes only: two planes take three digits a triple, and what memory saves is lost in work (docs/log.md).
    """
    if not isinstance(packed, PackedTernary) or not PRIMITIVES[type(isa)].base3 or not features().issuperset(NEEDS):
        return False
    return isinstance(activations, Int8) and block in BLOCKS and packed.codes.size * 4 >= FEWEST


def repacked(isa: Isa, activations: Activations, packed: Packed, block: int) -> Packed:
    """A matrix in the layout that it is multiplied from."""
    if not suits(isa, activations, packed, block):
        return packed
    assert isinstance(packed, PackedTernary)
    return pack(packed, block)


def pack(packed: PackedTernary, block: int) -> PackedBase3:
    """A matrix of two bits a weight in this layout, for activations that share a scale in blocks of `block`."""
    count, steps = packed.codes.shape[:2]
    tiles, blocks = -(-count // 4), steps * 16 // block
    codes = aligned((blocks, tiles, n_bytes(block), ROWS), np.dtype(np.uint8))
    scales = np.zeros((packed.scales.shape[1], tiles, 4, 16), np.uint16)
    by_tile = scales.reshape(len(scales), -1, 16)
    by_tile[:, :count] = packed.scales.transpose(1, 0, 2)
    at_once = max(1, _PART // (ROWS * steps * 16))
    for first in range(0, tiles, at_once):
        part = packed.codes[4 * first : 4 * (first + at_once)]
        missing = -len(part) % 4
        if missing:
            part = np.concatenate([part, np.full((missing, *part.shape[1:]), 0x55, np.uint8)])
        found = _bytes(_triples(_quads(part, block)), block)
        codes[:, first : first + at_once] = found.reshape(*found.shape[:2], -1, ROWS).transpose(0, 2, 1, 3)
    return PackedBase3(codes, scales.reshape(len(scales), tiles, ROWS))


def _each(byte: int) -> np.uint64:
    """The byte in all eight of a word: words are quicker to shift than bytes."""
    return np.uint64(byte * 0x0101010101010101)


def _up(x: np.ndarray, mask: int, distance: int) -> np.ndarray:
    """Bits of every byte, moved up."""
    return (x & _each(mask)) << np.uint64(distance)


def _down(x: np.ndarray, distance: int, mask: int) -> np.ndarray:
    """Bits of every byte, moved down."""
    return x >> np.uint64(distance) & _each(mask)


def _quads(codes: np.ndarray, block: int) -> np.ndarray:
    """Four codes a byte, of four neighbours: uint64 [blocks, quads, lanes of all tiles / 8] of codes [4 tiles, steps, 16, 4] of a PackedTernary.

    The quads are filled up to twelves of columns with codes 0.
    """
    count, steps = codes.shape[:2]
    words = np.ascontiguousarray(codes.view("<u4").reshape(count // 4, 4, steps, 16).transpose(1, 2, 0, 3))
    turned_fields(words)  # byte i of a row has quad i; then byte j of quad i's word has tile j of 16 rows
    for distance, mask, pairs in ((8, 0x00FF00FF, ((0, 1), (2, 3))), (16, 0x0000FFFF, ((0, 2), (1, 3)))):
        for i, j in pairs:
            swap(words[i], words[j], distance, mask)
    blocks, own = steps * 16 // block, block // 4
    found = np.full((blocks, own + -own % 3, count * 2), _each(0x55), np.uint64)
    for i in range(4):
        found[:, i:own:4] = words[i].view("<u8").reshape(blocks, own // 4, -1)
    return found


def _triples(quads: np.ndarray) -> np.ndarray:
    """uint64 [blocks, triples, lanes / 8]: what the last twelve has no columns for is left over."""
    threes = quads & _each(63)  # c0 + 4 c1 + 16 c2, less c1 + 4 c2 and 3 c2
    threes -= _down(quads, 2, 15)
    threes -= _down(quads, 4, 3) * np.uint64(3)
    found = np.empty((len(quads), quads.shape[1] // 3, 4, quads.shape[2]), np.uint64)
    last = _down(quads, 6, 3)
    found[:, :, 0], found[:, :, 2], found[:, :, 3] = (threes[:, i::3] for i in range(3))
    found[:, :, 1] = last[:, 0::3] + last[:, 1::3] * np.uint64(3) + last[:, 2::3] * np.uint64(9)
    return found.reshape(len(quads), -1, quads.shape[2])


def _bytes(x: np.ndarray, block: int) -> np.ndarray:
    """uint8 [blocks, bytes, lanes] of triples."""
    triples = n_triples(block)
    groups, whole = triples // 8, triples // 8 * 8
    found = np.empty((len(x), n_bytes(block), x.shape[2]), np.uint64)
    for start, stop, by, to, each in ((0, whole, 8, 0, 5), (3, whole, 8, 2, 5), (whole, triples, 3, 5 * groups, 2)):
        end = 5 * groups if by == 8 else n_bytes(block)
        one, two, both = (x[:, start + i : stop : by] for i in range(3))
        found[:, to:end:each] = one | _up(both, 7, 5)
        found[:, to + 1 : end : each] = two | _up(both, 24, 2)
    last, end = x[:, 7:whole:8], 5 * groups
    found[:, 1:end:5] |= _up(last, 8, 4)
    found[:, 3:end:5] |= _up(last, 16, 3)
    found[:, 4:end:5] = x[:, 6:whole:8] | _up(last, 7, 5)
    return found.view(np.uint8)
