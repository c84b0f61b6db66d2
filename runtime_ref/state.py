"""State: everything a Mamba-2 remembers of a text. Constant in size, so it is a prompt cache that fits in a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from runtime_ref.errors import StateError
from tmexport.files import atomic_write

FORMAT = "runtime_ref-state-1"


@dataclass
class State:
    """The recurrent state of one sequence.

    conv fp32 [L, d_conv - 1, conv_dim]; ssm [L, H, P, N], fp32 in profile exact and fp16 in fast; tokens: how many were
    read; model: the fingerprint of the weights it belongs to; profile: the arithmetic it was made with.
    """

    conv: np.ndarray
    ssm: np.ndarray
    tokens: int
    model: str
    profile: str

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.ssm.nbytes

    def copy(self) -> State:
        """An independent copy: continue one prompt in several ways."""
        return replace(self, conv=self.conv.copy(), ssm=self.ssm.copy())

    def save(self, path: Path | str) -> None:
        """Write to a file (safetensors), atomically.

        Raises:
            TmexportError: the file cannot be written.
        """
        about = {"format": FORMAT, "model": self.model, "profile": self.profile, "tokens": self.tokens}
        with atomic_write(path) as file:
            file.write(save({"conv": self.conv, "ssm": self.ssm}, {"runtime_ref": json.dumps(about)}))

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
                if not isinstance(about, dict) or about.get("format") != FORMAT:
                    raise StateError(f"{path}: is not a saved state ({FORMAT})")
                for what, want in (("model", like.model), ("profile", like.profile)):
                    if about.get(what) != want:
                        raise StateError(f"{path}: was saved with the {what} {about.get(what)}; expected {want}")
                tokens = about.get("tokens")
                arrays = {name: file.get_tensor(name) for name in ("conv", "ssm")}
        except StateError:
            raise
        except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
            raise StateError(f"{path}: cannot be read as a saved state: {error}") from None
        for name, array in arrays.items():
            want = getattr(like, name)
            if array.shape != want.shape or array.dtype != want.dtype:
                raise StateError(
                    f"{path}: {name} is {array.dtype} {list(array.shape)}; expected {want.dtype} {list(want.shape)}"
                )
        if type(tokens) is not int or tokens < 0:
            raise StateError(f"{path}: the token count is {tokens!r}; expected a whole number")
        conv, ssm = (np.array(arrays[name]) for name in ("conv", "ssm"))
        return cls(conv, ssm, tokens, like.model, like.profile)
