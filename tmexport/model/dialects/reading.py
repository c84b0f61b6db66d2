"""What the dialects share: reading values out of a config.json or a GGUF's keys, and refusing what cannot be represented."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmexport.errors import ConfigError, GGUFError
from tmexport.model.branches.mamba1 import Mamba1
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.spec import Model, Names, shown

CONTEXT_LENGTH = 2**20  # a recurrent model has no limit; llama.cpp's converter writes this


# mamba_ssm's names, which transformers kept
BACKBONE = Names(
    embedding=("backbone.embeddings.weight", "token_embd.weight"),
    final_norm=("backbone.norm_f.weight", "output_norm.weight"),
    head=("lm_head.weight", "output.weight"),
    block=("backbone.layers.{}.", "blk.{}."),
    norm="norm.weight",
    norms=("attn_norm.weight",),
)


@dataclass(frozen=True)
class Keys:
    """The metadata of a GGUF, with the shapes of its tensors (numpy order)."""

    path: object
    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    architecture: str

    @property
    def here(self) -> set[str]:
        """The keys of the architecture, without its prefix."""
        prefix = self.architecture + "."
        return {key.removeprefix(prefix) for key in self.metadata if key.startswith(prefix)}

    def whole(self, key: str) -> int:
        """A positive whole number under "ARCHITECTURE.key".

        Raises:
            GGUFError: it is missing, or something else.
        """
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise GGUFError(f"{self.path}: {self.architecture}.{key} is {value!r}; expected a positive whole number")
        return value

    def common(self) -> dict[str, Any]:
        """The fields of Model that every architecture states in the same way.

        Raises:
            GGUFError: there is no embedding, or a stated number of tokens is not its number of rows.
        """
        embedding = self.shapes.get("token_embd.weight")
        if embedding is None or len(embedding) != 2:
            raise GGUFError(f"{self.path}: has no matrix token_embd.weight; it is not a complete model")
        key = f"{self.architecture}.vocab_size"
        rows = self.metadata.get(key, embedding[0])
        if rows != embedding[0]:
            raise GGUFError(
                f"{self.path}: {key} is {rows!r}, but token_embd.weight has {embedding[0]} rows; expected them to agree"
            )
        epsilon = self.metadata.get(f"{self.architecture}.attention.layer_norm_rms_epsilon")
        return {
            "d_model": self.whole("embedding_length"),
            "vocab_size": embedding[0],
            # stored as fp32: the nearest short decimal is the number that was meant (1e-5, not 9.99999974e-06)
            "rms_eps": float(f"{epsilon:.7g}") if isinstance(epsilon, float) else epsilon,
            "tie_embeddings": "output.weight" not in self.shapes,
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "family": self.architecture,
        }


@dataclass(frozen=True)
class Family:
    """Models that are called the same: name, which is GGUF's architecture; names of tensors; both directions of both files.

    folds: (config.json, model) -> by role, factors fp32 of the dense weights in a checkpoint, taken one after another.
    """

    name: str
    names: Names
    to_hf: Callable[[Model], dict[str, Any]]
    to_gguf: Callable[[Model], dict[str, Any]]  # without the architecture's prefix
    from_gguf: Callable[[Keys], Model]
    folds: Callable[[Mapping[str, Any], Model], Mapping[str, tuple[np.ndarray, ...]]] = lambda raw, model: {}


def common_keys(model: Model) -> dict[str, Any]:
    """The GGUF keys of `Keys.common`, and those that llama.cpp wants of every model; in the order of the file."""
    return {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": model.d_model,
        "feed_forward_length": 0,
        "attention.head_count": 0,
        "block_count": model.n_layer,
        "vocab_size": model.vocab_size,
        "attention.layer_norm_rms_epsilon": model.rms_eps,
    }


def pure_mamba_config(model: Model, architecture: str, c: Mamba1 | Mamba2) -> dict[str, Any]:
    """What transformers' config.json of a pure Mamba says whichever the mixer `c` is."""
    return {
        "architectures": [architecture],
        "model_type": model.family,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layer,
        "vocab_size": model.vocab_size,
        "state_size": c.d_state,
        "conv_kernel": c.d_conv,
        "expand": c.d_inner // model.d_model,
        "layer_norm_epsilon": model.rms_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": None,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
    }


def need(raw: Mapping[str, Any], key: str) -> Any:
    """The value of a key that must be there."""
    if key not in raw:
        raise ConfigError(f"{key} is missing")
    return raw[key]


def as_float(value: Any, name: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:  # NaN fails too
        raise ConfigError(f"{name} is {shown(value)}; expected a finite number")
    return float(value)


@dataclass(frozen=True)
class Rule:
    """A key of config.json that would change the arithmetic.

    allowed: the values that mean our model (null counts as not there); why: what another value would need; checked: how we
    know that these are all, where the name alone does not say it.
    """

    key: str
    allowed: tuple[Any, ...]
    why: str
    checked: str = ""

    def check(self, raw: Mapping[str, Any]) -> None:
        """Raises ConfigError if the key is there with a value that is not allowed."""
        value = raw.get(self.key)
        if value is not None and not any(type(value) is type(fits) and value == fits for fits in self.allowed):
            wanted = " or ".join(map(repr, self.allowed)) or "null"
            raise ConfigError(f"{self.key} is {value!r}; only {wanted} can be represented ({self.why})")


def refuse_dt_clamp(limit: Any) -> None:
    """Raises ConfigError unless dt is limited to (0, infinity)."""
    if limit is None:
        return
    if isinstance(limit, list | tuple) and len(limit) == 2:
        low, high = limit
        # transformers writes infinity as the JSON extension Infinity, as a string, or as {"__float__": "Infinity"}.
        if isinstance(high, dict):
            high = high.get("__float__")
        no_upper = high in ("inf", "Infinity", None) or (isinstance(high, float) and math.isinf(high))
        if low in (0, 0.0, None) and no_upper:
            return
    raise ConfigError(
        f"dt is clamped to {limit!r}; only (0, infinity) can be represented (llama.cpp does not clamp dt)"
    )


def first_id(value: Any) -> Any:
    """The first of several end tokens; an empty list names none."""
    return next(iter(value), None) if isinstance(value, list) else value


def padded_vocabulary(raw: Mapping[str, Any]) -> int:
    """Rows of the embedding, as mamba_ssm rounds vocab_size up."""
    vocab, multiple = need(raw, "vocab_size"), raw.get("pad_vocab_size_multiple", 8)
    if not isinstance(vocab, int) or not isinstance(multiple, int) or vocab < 1 or multiple < 1:
        raise ConfigError(
            f"vocab_size {vocab!r} and pad_vocab_size_multiple {multiple!r} must be positive whole numbers"
        )
    return -(-vocab // multiple) * multiple
