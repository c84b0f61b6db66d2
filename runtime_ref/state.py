"""State: everything a model remembers of a text. Constant in size, so it is a prompt cache that fits in a file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime_ref.arithmetic import Preset, StateArray
from runtime_ref.errors import StateError
from tmexport.files import atomic_write
from tmexport.model import Model as Config
from tmexport.model.spec import Branch

FORMAT = "runtime_ref-state-1"


def branch_state_arrays(branch: Branch, preset: Preset) -> list[StateArray]:
    """The arrays of one branch's state, under the names of its table."""
    result: list[StateArray] = []
    for spec in branch.states():
        fp32 = (StateArray(spec.name, spec.shape, np.dtype(np.float32)),)
        result += preset.state.arrays(spec.name, spec.shape) if spec.recurrent else fp32
    return result


def state_arrays(config: Config, preset: Preset) -> tuple[StateArray, ...]:
    """The arrays of one sequence's state, from the branches' tables.

    Branches of equal dimensions lie side by side in one array, in the order of the model, under the name of their table;
    further ones have their number behind it: conv, ssm, conv.1, ssm.1.
    """
    result: list[StateArray] = []
    for number, (branch, count) in enumerate(Counter(b for block in config.blocks for b in block.branches).items()):
        for name, shape, dtype in branch_state_arrays(branch, preset):
            result.append(StateArray(f"{name}.{number}" if number else name, (count, *shape), dtype))
    return tuple(result)


@dataclass
class State:
    """The state of one sequence.

    arrays: by name, as `state_arrays` lists them; tokens: how many were read; model: the fingerprint of the weights it
    belongs to; profile: the arithmetic it was made with.
    """

    arrays: dict[str, np.ndarray]
    tokens: int
    model: str
    profile: str

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def copy(self) -> State:
        """An independent copy: continue one prompt in several ways."""
        return replace(self, arrays={name: array.copy() for name, array in self.arrays.items()})

    def check(self, wanted: tuple[StateArray, ...]) -> None:
        """Native code gets the addresses of these arrays, and believes them.

        Raises:
            StateError: one is not a writeable, contiguous array of its shape and dtype.
        """
        for name, shape, dtype in wanted:
            array = self.arrays.get(name)
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
            file.write(save(self.arrays, {"runtime_ref": json.dumps(about)}))

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
        for name, want in like.arrays.items():
            array = arrays[name]
            if array.shape != want.shape or array.dtype != want.dtype:
                raise StateError(
                    f"{path}: {name} is {array.dtype} {list(array.shape)}; expected {want.dtype} {list(want.shape)}"
                )
        tokens = about.get("tokens")
        if type(tokens) is not int or tokens < 0:
            raise StateError(f"{path}: the token count is {tokens!r}; expected a whole number")
        return cls({name: np.array(array) for name, array in arrays.items()}, tokens, like.model, like.profile)


def _check_about(path: Path | str, about: Any, like: State) -> None:
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise StateError(f"{path}: is not a saved state ({FORMAT})")
    for what, want in (("model", like.model), ("profile", like.profile)):
        if about.get(what) != want:
            raise StateError(f"{path}: was saved with the {what} {about.get(what)}; expected {want}")
