"""Matrices in the kernels' layout, a file a kind of weights: 16 interleaved rows, so that each 32-bit lane of a vector owns one
output row. Rows are filled up to a multiple of 16 with zero codes and zero scales.

A file has the arrays of its kind (a NamedTuple), PACK (from a plain matrix, by its class) and, from the blocks of a GGUF tensor without decoding
to one byte a weight, CODES and VALUES (by GGUF type). The blocks are checked on the way as `tmexport.types` checks them, some rows
at a time, by numpy: compiled loops are faster for TQ2_0 and Q8_0, but would have to be compiled before the first token.
`kernels.kinds` puts the files together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from tmexport.errors import GGUFError
from tmexport.types import GGMLType

ROWS = 16
_PART = 256 << 10  # bytes of blocks at a time

Wanted = list[tuple[tuple[int, ...], Any]]  # the shape and the dtype of each array


class Packed(Protocol):
    """The arrays of a matrix [n, k]."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def wanted(self, n: int, k: int, block: int, where: str) -> Wanted:
        """What the arrays of a matrix [n, k] are that is multiplied with activations in blocks of `block`.

        Raises:
            ValueError: naming `where`: no such matrix can be multiplied so.
        """


# blocks uint8 [n, bytes of a row] of a matrix [n, k], its type, k, the group size of codes (None for values), its name for
# messages -> the matrix. Raises GGUFError for damaged blocks.
Reader = Callable[[np.ndarray, GGMLType, int, int | None, str], Packed]


def expect(packed: Packed, n: int, k: int, block: int, where: str) -> None:
    """Check a matrix [n, k] before native code reads it: every size and dtype it will rely on.

    Raises:
        ValueError: naming `where`.
    """
    for array, (shape, dtype) in zip(packed, packed.wanted(n, k, block, where), strict=True):
        if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{where}: holds {array.dtype} {list(array.shape)}; expected {np.dtype(dtype)} {list(shape)}"
            )


def tiled(scales: np.ndarray) -> np.ndarray:
    """Scales fp16 [n, b] as their bits uint16 [n/16, b, 16]."""
    n, count = scales.shape
    filled = np.zeros((-(-n // ROWS) * ROWS, count), np.float16)
    filled[:n] = scales
    return np.ascontiguousarray(filled.view(np.uint16).reshape(-1, ROWS, count).transpose(0, 2, 1))


def filled_codes(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [n, k] with rows of zeros up to a multiple of 16."""
    n, k = codes.shape
    filled = np.zeros((-(-n // ROWS) * ROWS, k), np.int8)
    filled[:n] = codes
    return filled


def finite(bits: np.ndarray, name: str) -> None:
    """Refuse NaN and infinite fp16 (all bits of the exponent set)."""
    if ((bits & np.uint16(0x7C00)) == 0x7C00).any():
        raise GGUFError(f"{name}: holds NaN or infinite values; the file is damaged")


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts on a cache line, its contents undefined."""
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(n_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


def blank(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Room for a large matrix on a cache line; only the last tile, which may have rows to spare, is cleared."""
    array = aligned(shape, np.dtype(dtype))
    array[-1] = 0
    return array


class Blocks(NamedTuple):
    """Of some rows: data uint32 or uint8 [rows, blocks, numbers of a block], scales' bits uint16 [blocks, rows]."""

    data: np.ndarray
    scales: np.ndarray

    def turned(self) -> np.ndarray:
        """A copy of the data [numbers of a block, blocks, rows]."""
        return np.ascontiguousarray(self.data.transpose(2, 1, 0))


def parts(blocks: np.ndarray, fields: np.dtype) -> Iterator[tuple[int, Blocks]]:
    """Some rows at a time, few enough for the processor's cache, and the number of the first one; fields: d and q of a block."""
    rows = max(1, _PART // (ROWS * max(1, blocks.shape[1]))) * ROWS
    for at in range(0, len(blocks), rows):
        part = blocks[at : at + rows].view(fields)
        yield at, Blocks(part["q"], np.ascontiguousarray(part["d"].T))


def put(values: np.ndarray, at: int, tiles: np.ndarray) -> None:
    """values [steps of a block, blocks, rows], from row `at` (a multiple of 16), in tiles [n / 16, all steps, 16]."""
    steps, blocks, rows = values.shape
    first, whole = at // ROWS, rows // ROWS
    by_block = tiles.reshape(len(tiles), blocks, steps, ROWS)
    tiled = values[:, :, : whole * ROWS].reshape(steps, blocks, whole, ROWS)
    by_block[first : first + whole] = tiled.transpose(2, 1, 0, 3)
    if rows % ROWS:
        by_block[first + whole, :, :, : rows % ROWS] = values[:, :, whole * ROWS :].transpose(1, 0, 2)
