"""The presets of arithmetic (`--profile`): how activations are rounded, times how a recurrent state is kept.

docs/numerics.md is the contract. Everything that offers, checks or depends on a preset asks this file: a preset is a line of
PRESETS, a number format a class. The classes are NamedTuples so that Numba compiles the kernels for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tmexport.errors import UsageError

Arrays = Sequence[np.ndarray]


class StateArray(NamedTuple):
    """One array of a state: its name, shape and dtype; grows: the shape is that of one position."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    grows: bool = False

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Int16(NamedTuple):
    """Activations in -levels..levels, a scale for each group of the weight: q = 256 * high + low, both in int8."""

    levels: np.float32 = np.float32(32512.0)  # 127 * 256

    def block(self, group: int, stock: int) -> int:
        """How many activations share a scale, for a weight with scales a group, which llama.cpp multiplies by `stock`."""
        return group


class Int8(NamedTuple):
    """Activations in -levels..levels, a scale for as many as llama.cpp gives one with the weight's container."""

    levels: np.float32 = np.float32(127.0)

    def block(self, group: int, stock: int) -> int:
        """As Int16's."""
        return stock


class Row(NamedTuple):
    """What a token does to the rows of a recurrent state, h = h * decay + step * b; a row is what one sum over h * c reads.

    decay: fp32 [rows..., N or 1]; slowest [rows...]: the largest decay of a row; step [rows...]; b [rows... or 1..., N];
    position: of the token in its text, the first being 0.
    """

    decay: np.ndarray
    slowest: np.ndarray
    step: np.ndarray
    b: np.ndarray
    position: int


class Fp32(NamedTuple):
    """Numbers as they are computed."""

    width: int = 4  # bytes a number

    def arrays(self, name: str, shape: tuple[int, ...]) -> tuple[StateArray, ...]:
        """What a state of this name and shape consists of."""
        return (StateArray(name, shape, np.dtype(np.float32)),)

    def read(self, stored: np.ndarray) -> np.ndarray:
        """The state in fp32."""
        return stored

    def advance(self, stored: Arrays, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """One token. Returns what the sums over a row read, and what they are multiplied by (the state's unit)."""
        return _advance(self, stored, row)


class Fp16(NamedTuple):
    """Numbers rounded to fp16 after every token; a token's output is made from the ones before rounding."""

    width: int = 2

    def arrays(self, name: str, shape: tuple[int, ...]) -> tuple[StateArray, ...]:
        """As Fp32's."""
        return (StateArray(name, shape, np.dtype(np.float16)),)

    def read(self, stored: np.ndarray) -> np.ndarray:
        """As Fp32's."""
        return stored.astype(np.float32)

    def advance(self, stored: Arrays, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """As Fp32's."""
        return _advance(self, stored, row)


def _advance(kept_as: Fp32 | Fp16, stored: Arrays, row: Row) -> tuple[np.ndarray, np.ndarray]:
    h = kept_as.read(stored[0]) * row.decay
    h = h + row.step[..., None] * row.b
    stored[0][...] = h
    return h, np.ones(h.shape[:-1], np.float32)


class Int8Rows(NamedTuple):
    """Codes in -127..127 with an fp32 scale a row, which follows a bound of the row's largest value.

    The bound needs no look at the row: what was there, faded, and the largest that the token can add. Every REFRESH tokens it
    is tightened by the largest code.
    """

    width: int = 1

    def arrays(self, name: str, shape: tuple[int, ...]) -> tuple[StateArray, ...]:
        """As Fp32's: the codes, and the scales of the rows."""
        return (
            StateArray(name, shape, np.dtype(np.int8)),
            StateArray(f"{name}_scale", shape[:-1], np.dtype(np.float32)),
        )

    def advance(self, stored: Arrays, row: Row) -> tuple[np.ndarray, np.ndarray]:
        """As Fp32's."""
        codes, scales = stored
        top, scale = LEVELS, scales
        if row.position % REFRESH == 0:
            top = np.abs(codes).max(-1).astype(np.float32)
            scale = scale * np.minimum(top, np.float32(1.0))
        largest = np.abs(row.b).max(-1)
        step = np.where(largest < TINY, np.float32(0.0), row.step)
        bound = (scale * top) * row.slowest + np.abs(step) * largest
        small, broken = bound < TINY, ~(bound < np.inf)
        inverse = np.where(small | broken, np.float32(0.0), LEVELS / np.where(small, LEVELS, bound))
        unit = np.where(small, np.float32(0.0), np.where(broken, np.float32(np.nan), bound * PER_LEVEL))
        h = codes * ((scale[..., None] * row.decay) * inverse[..., None])
        h = h + (step * inverse)[..., None] * row.b
        codes[...] = np.where(broken[..., None], np.float32(0.0), np.rint(h))
        scales[...] = unit
        return h, unit


REFRESH = 8  # tokens
LEVELS, PER_LEVEL, TINY = np.float32(127.0), np.float32(0.00787401574803149606), np.float32(2.0**-100)

Activations = Int16 | Int8
RecurrentState = Fp32 | Fp16 | Int8Rows


@dataclass(frozen=True)
class Preset:
    """How activations are rounded, and how recurrent states and (`cache`) attention's keys and values are kept; about: half
    a sentence for help texts.
    """

    name: str
    activations: Activations
    state: RecurrentState
    cache: Fp32 | Fp16
    about: str

    def smaller(self) -> tuple[Preset, ...]:
        """Presets whose state takes less memory."""
        return tuple(p for p in PRESETS.values() if p.state.width < self.state.width)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("exact", Int16(), Fp32(), Fp32(), "16-bit activations"),
        Preset("fast", Int8(), Fp16(), Fp16(), "8-bit activations and a 16-bit state"),
        Preset("compact", Int8(), Int8Rows(), Fp16(), "8-bit activations and an 8-bit state"),
    )
}
DEFAULT = "exact"
HELP = "; ".join(f"{preset.name}: {preset.about}" for preset in PRESETS.values()) + "."


def preset_of(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"profile is {name!r}; expected {' or '.join(PRESETS)}")
    return PRESETS[name]
