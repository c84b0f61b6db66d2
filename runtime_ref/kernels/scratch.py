"""The working arrays of a forward pass over R rows (a row is one token of one sequence)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.packed import aligned

CHUNK = 64  # rows of a forward pass: enough to use each unpacked weight often, few enough to stay in cache


class Scratch(NamedTuple):
    """x: residual stream; wide: what a projection reads, before quantisation; q*: the quantised activations (int16, and
    its int8 planes q = 256 * high + low; `low` alone in profile fast), their scales and sums a block; proj: in_proj's
    output; xbc: the convolution's; mid, dt: x_proj's and dt_proj's (Mamba-1), keys and values, up_proj's; sum: of a block's branches; bad: first layer of a row that gave an Inf
    or a NaN, or -1.
    """

    x: np.ndarray
    wide: np.ndarray
    q: np.ndarray
    high: np.ndarray
    low: np.ndarray
    q_scale: np.ndarray
    q_sum: np.ndarray
    proj: np.ndarray
    xbc: np.ndarray
    mid: np.ndarray
    dt: np.ndarray
    sum: np.ndarray
    bad: np.ndarray


@dataclass(frozen=True)
class Room:
    """How many values of a row the arrays hold; `wide` those of the longest row that a product reads."""

    x: int = 1
    wide: int = 1
    proj: int = 1
    xbc: int = 1
    mid: int = 1
    dt: int = 1
    sum: int = 1

    def __or__(self, other: Room) -> Room:
        """Enough for both."""
        return Room(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def nbytes(self, rows: int) -> int:
        """Of all arrays."""
        return rows * (9 * self.wide + 4 * (self.x + self.proj + self.xbc + self.mid + self.dt + self.sum))


def activations(rows: int, k: int) -> dict[str, np.ndarray]:
    """The arrays of a Scratch that a product reads: rows of up to k values, and what quantising them gives."""
    # 64 more than needed: rows a power of two apart would compete for the same cache sets
    width = -(-k // 64) * 64 + 64
    sixteens = -(-rows // 16) * 16  # AMX reads 16 rows at a time
    return {
        "wide": np.zeros((rows, width), np.float32),
        "q": np.zeros((rows, width), np.int16),
        "high": _lines(sixteens, width),
        "low": _lines(sixteens, width),
        "q_scale": np.zeros((sixteens, -(-width // 32)), np.float32),
        "q_sum": np.zeros((rows, -(-width // 32)), np.int32),
    }


def _lines(rows: int, width: int) -> np.ndarray:
    """Zeros int8 [rows, width]; each row begins with a cache line, or AMX would read two for many of its 32 bytes."""
    result = aligned((rows, width), np.dtype(np.int8))
    result[...] = 0
    return result


def allocate(rows: int, room: Room) -> Scratch:
    """Arrays for that many rows."""
    return Scratch(
        x=np.zeros((rows, room.x), np.float32),
        **activations(rows, room.wide),
        proj=np.zeros((rows, -(-room.proj // 16) * 16), np.float32),
        xbc=np.zeros((rows, room.xbc), np.float32),
        mid=np.zeros((rows, -(-room.mid // 16) * 16), np.float32),
        dt=np.zeros((rows, room.dt), np.float32),
        sum=np.zeros((rows, -(-room.sum // 16) * 16), np.float32),
        bad=np.full(rows, -1, np.int64),
    )
