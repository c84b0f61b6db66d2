"""Pure Mamba-2 with an operation that no stock program has: a Hadamard matrix that turns what out_proj reads, at every token.

Its config.json and its GGUF are those of `mamba2` under another name, so that stock programs refuse them instead of printing
noise, with the size of the matrix: `online_hadamard`, `tmexport-mamba2.ssm.online_hadamard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tmexport.model.dialects import mamba2
from tmexport.model.dialects.reading import BACKBONE, Family, Keys, need
from tmexport.model.spec import Block, Model, whole_number

NAME = "tmexport-mamba2"
DESCRIBED = f"{NAME!r} (tmexport)"
_KEY, _GGUF_KEY = "online_hadamard", "ssm.online_hadamard"


def turned(model: Model, size: int) -> Model:
    """A pure Mamba-2 whose out_proj reads what a Hadamard matrix of this size turned.

    Raises:
        ConfigError: the size is no power of two, or does not divide d_inner.
    """
    whole_number(_KEY, size)
    branch = replace(mamba2.the_branch(model), online_hadamard=size)
    return replace(model, blocks=(Block((branch,)),) * model.n_layer, family=NAME)


def _from_hf(raw: Mapping[str, Any]) -> Model:
    return turned(mamba2.from_hf(raw), need(raw, _KEY))


def _to_hf(model: Model) -> dict[str, Any]:
    return mamba2.FAMILY.to_hf(model) | {"architectures": [], _KEY: mamba2.the_branch(model).online_hadamard}


def _to_gguf(model: Model) -> dict[str, Any]:
    return mamba2.FAMILY.to_gguf(model) | {_GGUF_KEY: mamba2.the_branch(model).online_hadamard}


def _from_gguf(keys: Keys) -> Model:
    return turned(mamba2.FAMILY.from_gguf(keys), keys.whole(_GGUF_KEY))


READERS = ((lambda raw: raw.get("model_type") == NAME, _from_hf),)
FAMILY = Family(name=NAME, names=BACKBONE, to_hf=_to_hf, to_gguf=_to_gguf, from_gguf=_from_gguf)
