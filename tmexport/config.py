"""Mamba2Config: the dimensions of a model, read from any of the dialects in use.

Dialects: `state-spaces/mamba2-*` (mamba_ssm's `MambaConfig`), Hugging Face `Mamba2ForCausalLM`, and the metadata of a
GGUF file (`tmexport.gguf.names`). A model that needs something llama.cpp and our runtime do not compute (a clamp of dt,
projection biases, D per channel, attention layers) is refused here, in one place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmexport.errors import ConfigError
from tmexport.files import file_in, read_text

_LARGEST_DIMENSION = 2**24  # far above any model, far below an overflow: stops absurd values before they are used
_LARGEST = {"n_layer": 1024, "vocab_size": 2**21}  # lists of tensors and of tokens are as long as these
_LARGEST_FILE = 2**20


@dataclass(frozen=True)
class Mamba2Config:
    """Dimensions of a Mamba-2 language model (Dao & Gu 2024, arXiv 2405.21060), names as in mamba_ssm.

    vocab_size counts the rows of the embedding, padding rows included.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    n_groups: int = 1
    rms_eps: float = 1e-5
    tie_embeddings: bool = True
    chunk_size: int = 256
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "n_layer",
            "vocab_size",
            "d_state",
            "d_conv",
            "expand",
            "headdim",
            "n_groups",
            "chunk_size",
        ):
            value = getattr(self, name)
            largest = _LARGEST.get(name, _LARGEST_DIMENSION)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                raise ConfigError(f"{name} is {_show(value)}; expected a whole number from 1 to {largest}")
        if self.d_conv < 2:
            raise ConfigError(f"d_conv is {self.d_conv}; expected at least 2")
        if self.d_inner % self.headdim:
            raise ConfigError(f"d_inner {self.d_inner} is not a multiple of headdim {self.headdim}")
        if self.n_heads % self.n_groups:
            raise ConfigError(f"{self.n_heads} heads cannot be shared by {self.n_groups} groups of B and C")
        if not (isinstance(self.rms_eps, float) and 0.0 < self.rms_eps < 1.0):
            raise ConfigError(f"the norm's epsilon is {self.rms_eps!r}; expected a number between 0 and 1")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value < self.vocab_size):
                raise ConfigError(
                    f"{name} is {_show(value)}; expected a token id below the vocabulary of {self.vocab_size}"
                )
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(f"tied embeddings are {_show(self.tie_embeddings)}; expected true or false")

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C side by side."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Rows of in_proj: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.n_heads

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face config.json of a `Mamba2ForCausalLM`."""
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_size": self.d_model,
            "num_hidden_layers": self.n_layer,
            "vocab_size": self.vocab_size,
            "state_size": self.d_state,
            "conv_kernel": self.d_conv,
            "expand": self.expand,
            "head_dim": self.headdim,
            "num_heads": self.n_heads,
            "n_groups": self.n_groups,
            "layer_norm_epsilon": self.rms_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "chunk_size": self.chunk_size,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": None,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "residual_in_fp32": True,
        }


def load_config(folder: Path | str) -> tuple[Mamba2Config, dict[str, Any]]:
    """The dimensions in `folder`/config.json, and the parsed file itself.

    Raises:
        ConfigError: the file is missing, is not JSON, or describes a model that cannot be exported.
        CheckpointError: the file is a link that leaves the folder, or not a file.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ConfigError(f"{path}: no such file; expected a checkpoint folder with a config.json")
    try:
        raw = json.loads(read_text(file_in(folder, "config.json"), _LARGEST_FILE))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds a {type(raw).__name__}; expected a JSON object")
    try:
        return parse_config(raw), raw
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_config(raw: Mapping[str, Any]) -> Mamba2Config:
    """A config.json of either dialect as a Mamba2Config; anything that would change the arithmetic is refused."""
    if raw.get("model_type") == "mamba2" or "num_hidden_layers" in raw:
        return _from_hf(raw)
    if "d_model" in raw and "n_layer" in raw:
        return _from_state_spaces(raw)
    found = raw.get("model_type")
    raise ConfigError(
        f"model_type is {found!r}; expected 'mamba2' (Hugging Face), or d_model and n_layer (state-spaces)"
    )


def _need(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise ConfigError(f"{key} is missing")
    return raw[key]


def _as_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:  # NaN fails too
        raise ConfigError(f"{name} is {_show(value)}; expected a finite number")
    return float(value)


def _show(value: Any) -> str:
    """A value for a message; the digits of a huge whole number cannot be printed (and take forever)."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a whole number of {value.bit_length()} bits"
    return repr(value)


def _refuse_unless(raw: Mapping[str, Any], allowed: Mapping[str, Any], why: str) -> None:
    for key, want in allowed.items():
        if key in raw and raw[key] is not None and raw[key] != want:
            raise ConfigError(f"{key} is {raw[key]!r}; only {want!r} can be represented ({why})")


def _refuse_dt_clamp(limit: Any) -> None:
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


def _from_hf(raw: Mapping[str, Any]) -> Mamba2Config:
    _refuse_unless(
        raw,
        {"use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "norm_before_gate": False},
        "llama.cpp's mamba2 has no other",
    )
    _refuse_dt_clamp(raw.get("time_step_limit"))
    config = Mamba2Config(
        d_model=_need(raw, "hidden_size"),
        n_layer=_need(raw, "num_hidden_layers"),
        vocab_size=_need(raw, "vocab_size"),
        d_state=raw.get("state_size", 128),
        d_conv=raw.get("conv_kernel", 4),
        expand=raw.get("expand", 2),
        headdim=raw.get("head_dim", 64),
        n_groups=raw.get("n_groups", 8),  # transformers' default, not mamba_ssm's
        rms_eps=_as_float(raw.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon"),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        chunk_size=raw.get("chunk_size", 256),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=_first_id(raw.get("eos_token_id")),
    )
    heads = raw.get("num_heads")
    if heads is not None and heads != config.n_heads:
        raise ConfigError(
            f"num_heads is {heads!r}, but expand * hidden_size / head_dim is {config.n_heads}; expected them to agree"
        )
    return config


def _first_id(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _from_state_spaces(raw: Mapping[str, Any]) -> Mamba2Config:
    ssm = raw.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise ConfigError(f"ssm_cfg is a {type(ssm).__name__}; expected a JSON object")
    if ssm.get("layer", "Mamba1") != "Mamba2":
        raise ConfigError(f"ssm_cfg.layer is {ssm.get('layer', 'Mamba1')!r}; expected 'Mamba2'")
    _refuse_unless(
        ssm,
        {
            "bias": False,
            "conv_bias": True,
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
            "d_ssm": None,
        },
        "llama.cpp's mamba2 has no other",
    )
    _refuse_unless(raw, {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}, "only pure Mamba-2 is supported")
    _refuse_dt_clamp(ssm.get("dt_limit"))
    vocab, multiple = _need(raw, "vocab_size"), raw.get("pad_vocab_size_multiple", 8)
    if not isinstance(vocab, int) or not isinstance(multiple, int) or vocab < 1 or multiple < 1:
        raise ConfigError(
            f"vocab_size {vocab!r} and pad_vocab_size_multiple {multiple!r} must be positive whole numbers"
        )
    return Mamba2Config(
        d_model=raw["d_model"],
        n_layer=raw["n_layer"],
        vocab_size=-(-vocab // multiple) * multiple,
        d_state=ssm.get("d_state", 128),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        headdim=ssm.get("headdim", 64),
        n_groups=ssm.get("ngroups", 1),
        rms_eps=_as_float(raw.get("norm_epsilon", 1e-5), "norm_epsilon"),
        tie_embeddings=raw.get("tie_embeddings", True),
        chunk_size=ssm.get("chunk_size", 256),
    )
