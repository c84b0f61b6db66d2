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


class Fp32(NamedTuple):
    """A recurrent state as it is computed."""

    width: int = 4  # bytes a number

    def arrays(self, name: str, shape: tuple[int, ...]) -> tuple[StateArray, ...]:
        """What a state of this name and shape consists of."""
        return (StateArray(name, shape, np.dtype(np.float32)),)

    def read(self, stored: Arrays) -> np.ndarray:
        """The state in fp32."""
        return stored[0]

    def write(self, stored: Arrays, state: np.ndarray) -> None:
        """Store an fp32 state."""
        stored[0][...] = state


class Fp16(NamedTuple):
    """A recurrent state rounded to fp16 after every token; a token's output is made from the one before rounding."""

    width: int = 2

    def arrays(self, name: str, shape: tuple[int, ...]) -> tuple[StateArray, ...]:
        """As Fp32's."""
        return (StateArray(name, shape, np.dtype(np.float16)),)

    def read(self, stored: Arrays) -> np.ndarray:
        """The state in fp32."""
        return stored[0].astype(np.float32)

    def write(self, stored: Arrays, state: np.ndarray) -> None:
        """Round and store an fp32 state."""
        stored[0][...] = state


Activations = Int16 | Int8
RecurrentState = Fp32 | Fp16


@dataclass(frozen=True)
class Preset:
    """A named pair; about: half a sentence for help texts."""

    name: str
    activations: Activations
    state: RecurrentState
    about: str

    def smaller(self) -> tuple[Preset, ...]:
        """Presets whose state takes less memory."""
        return tuple(p for p in PRESETS.values() if p.state.width < self.state.width)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("exact", Int16(), Fp32(), "16-bit activations"),
        Preset("fast", Int8(), Fp16(), "8-bit activations and a 16-bit state"),
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
