"""State: everything a model remembers of a text, which is a prompt cache that fits in a file.

A recurrent branch remembers a constant amount; attention the keys and values of every position, in arrays that grow in steps.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime_ref.arithmetic import Fp32, Preset, StateArray
from runtime_ref.errors import StateError
from tmexport.files import atomic_write
from tmexport.model import Model as Config
from tmexport.model.spec import Branch

FORMAT = "runtime_ref-state-1"
STEP = 256  # positions by which the arrays that grow do


def branch_state_arrays(branch: Branch, preset: Preset) -> list[StateArray]:
    """The arrays of one branch's state, under the names of its table."""
    result: list[StateArray] = []
    for spec in branch.states():
        kept_as = preset.state if spec.recurrent else preset.cache if spec.grows else Fp32()
        result += [array._replace(grows=spec.grows) for array in kept_as.arrays(spec.name, spec.shape)]
    return result


def state_arrays(config: Config, preset: Preset) -> tuple[StateArray, ...]:
    """The arrays of one sequence's state, from the branches' tables.

    Branches of equal dimensions lie side by side in one array, in the order of the model, under the name of their table;
    further ones have their number behind it: conv, ssm, conv.1, ssm.1. Of those that grow, shape leaves the positions out.
    """
    result: list[StateArray] = []
    for number, (branch, count) in enumerate(Counter(b for block in config.blocks for b in block.branches).items()):
        for array in branch_state_arrays(branch, preset):
            name = f"{array.name}.{number}" if number else array.name
            result.append(array._replace(name=name, shape=(count, *array.shape)))
    return tuple(result)


def with_positions(array: StateArray, positions: int) -> tuple[int, ...]:
    """The shape of an array of `state_arrays`: of one that grows [branches, positions, ...]."""
    return (array.shape[0], positions, *array.shape[1:]) if array.grows else array.shape


@dataclass(eq=False)
class Extent:
    """How many positions are in use of arrays that several states may share: those of the one that wrote last."""

    end: int


@dataclass
class State:
    """The state of one sequence.

    arrays: by name, as `state_arrays` lists them; tokens: how many were read; model: the fingerprint of the weights it
    belongs to; profile: the arithmetic it was made with; growing: names of the arrays that grow; extent: of those. Copies
    share them until two write: what was written is never changed, and only one may go on where it ends (`make_room`).
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    model: str
    profile: str
    growing: frozenset[str] = frozenset()
    extent: Extent = field(default_factory=lambda: Extent(0))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def copy(self) -> State:
        """An independent copy: continue one prompt in several ways. What grows is copied when it must be, if ever."""
        kept = {name: a if name in self.growing else a.copy() for name, a in self.arrays.items()}
        return replace(self, arrays=kept)

    def resized(self, positions: int) -> State:
        """A copy in which the arrays that grow have room for so many positions; what is beyond is left out, or 0."""
        own = {n: self._resized(n, positions) if n in self.growing else a.copy() for n, a in self.arrays.items()}
        return replace(self, arrays=own, extent=Extent(self.tokens))

    def shape_of(self, name: str, positions: int) -> tuple[int, ...]:
        """Of an array, where those that grow have room for so many positions."""
        shape = self.arrays[name].shape
        return (shape[0], positions, *shape[2:]) if name in self.growing else shape

    def _resized(self, name: str, positions: int) -> np.ndarray:
        array = self.arrays[name]
        room = np.zeros(self.shape_of(name, positions), array.dtype)
        used = min(positions, self.tokens)
        room[:, :used] = array[:, :used]
        return room

    def make_room(self, positions: int) -> None:
        """Let the arrays that grow hold so many positions, and be written by this state from its tokens on.

        They grow in steps, so that few tokens pay for a copy; and are copied if another state has gone on in them.
        """
        taken = self.extent.end != self.tokens
        if self.growing and (taken or self.room < positions):
            size = self.room if positions <= self.room else max(positions, self.room * 3 // 2)
            self.arrays |= {name: self._resized(name, -(-size // STEP) * STEP) for name in self.growing}
            self.extent = Extent(self.tokens)
        self.extent.end = positions

    @property
    def room(self) -> int:
        """Positions that fit."""
        return min((self.arrays[name].shape[1] for name in self.growing), default=0)

    def check(self, wanted: tuple[StateArray, ...]) -> None:
        """Native code gets the addresses of these arrays, and believes them.

        Raises:
            StateError: one is not a writeable, contiguous array of its shape and dtype.
        """
        for one in wanted:
            name, dtype, array = one.name, one.dtype, self.arrays.get(one.name)
            positions = array.shape[1] if one.grows and isinstance(array, np.ndarray) and array.ndim > 1 else 0
            shape = with_positions(one, max(positions, self.tokens))
            if (
                not isinstance(array, np.ndarray)
                or array.shape != shape
                or array.dtype != dtype
                or not array.flags.carray
            ):
                raise StateError(
                    f"the state's {name} is not a writeable, contiguous {dtype} array of shape {list(shape)}"
                )

    def save(self, path: Path | str) -> None:
        """Write to a file (safetensors), atomically.

        Raises:
            TmexportError: the file cannot be written.
        """
        about = {"format": FORMAT, "model": self.model, "profile": self.profile, "tokens": self.tokens}
        with atomic_write(path) as file:
            file.write(save(self.resized(self.tokens).arrays, {"runtime_ref": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path | str, like: State) -> State:
        """Read a file written by `save`, for the model and profile that `like` (a new state) belongs to.

        Raises:
            StateError: the file is missing, damaged, or belongs to another model or profile.
        """
        if not Path(path).is_file():  # a pipe would never open
            raise StateError(f"{path}: no such file; expected a saved state")
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {}).get("runtime_ref", "{}"))
                _check_about(path, about, like)
                arrays = {name: file.get_tensor(name) for name in like.arrays}
        except StateError:
            raise
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise StateError(f"{path}: cannot be read as a saved state: {error}") from None
        tokens = about.get("tokens")
        if type(tokens) is not int or not 0 <= tokens < 2**40:
            raise StateError(f"{path}: the token count is {tokens!r}; expected a whole number")
        for name, want in like.arrays.items():
            array, shape = arrays[name], like.shape_of(name, tokens)
            if array.shape != shape or array.dtype != want.dtype:
                raise StateError(
                    f"{path}: {name} is {array.dtype} {list(array.shape)}; expected {want.dtype} {list(shape)}"
                )
        own = {name: np.array(array) for name, array in arrays.items()}
        return cls(own, tokens, like.model, like.profile, like.growing, Extent(tokens))


def _check_about(path: Path | str, about: Any, like: State) -> None:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise StateError(f"{path}: is not a saved state ({FORMAT})")
    for what, want in (("model", like.model), ("profile", like.profile)):
        if about.get(what) != want:
            raise StateError(f"{path}: was saved with the {what} {about.get(what)}; expected {want}")
