"""Falcon-H1: Hugging Face `FalconH1ForCausalLM`, GGUF `falcon-h1`. Mamba-2 and attention read one norm, then SwiGLU.

Its multipliers are folded into the weights when a checkpoint is read, as llama.cpp's converter folds them: what is trained,
exported and computed has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tmexport.errors import ConfigError
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.branches.mlp import SwiGLU
from tmexport.model.dialects import layers as shared
from tmexport.model.dialects.reading import Family, Keys, Rule, as_float, first_id, need, refuse_dt_clamp
from tmexport.model.spec import MOST_BLOCKS, Files, Model, whole_number

DESCRIBED = "'falcon_h1' (Hugging Face)"
RULES = (
    *shared.ATTENTION_RULES,
    Rule("attention_bias", (False,), "llama.cpp's falcon-h1 leaves out the output's bias"),
    Rule("projectors_bias", (False,), "llama.cpp's falcon-h1 has no tensor for it"),
    Rule("mamba_proj_bias", (False,), "llama.cpp's falcon-h1 has no tensor for it"),
    Rule("mamba_conv_bias", (True,), "the convolution has a bias here"),
    Rule("mamba_use_mlp", (True,), "every layer has an MLP here"),
)
FILES = Files(
    embedding="model.embed_tokens.weight",
    final_norm="model.final_layernorm.weight",
    layer="model.layers.{}.",
    norms=("input_layernorm.weight", "pre_ff_layernorm.weight"),
    branches={"attention": "self_attn.", "mamba2": "mamba.", "swiglu": "feed_forward."},
)
_SINGLE = ("attention_in", "attention_out", "key", "ssm_in", "ssm_out", "embedding", "lm_head")
_SEVERAL = {"mlp_multipliers": 2, "ssm_multipliers": 5}  # gate and down; z, x, B, C and dt


def _from_hf(raw: Mapping[str, Any]) -> Model:
    shared.check_rules(raw, RULES)
    refuse_dt_clamp(raw.get("time_step_limit"))
    gate_norm = raw.get("mamba_rms_norm", False)
    if gate_norm and raw.get("mamba_norm_before_gate", True):
        raise ConfigError(
            "mamba_norm_before_gate is True; only False can be represented where mamba_rms_norm is True "
            "(llama.cpp's falcon-h1 multiplies by the gate first)"
        )
    d_model, layers = need(raw, "hidden_size"), shared.layer_count(raw)
    whole_number("hidden_size", d_model)
    d_inner = raw.get("mamba_d_ssm", 1024)  # transformers' default
    mixer = shared.mamba2_from(
        raw, raw.get("mamba_expand", 2) * d_model if d_inner is None else d_inner, bool(gate_norm)
    )
    attention = shared.attention_from(raw, shared.rope_theta(raw))
    several = _multipliers(raw)
    tied = raw.get("tie_word_embeddings", False)
    return Model(
        d_model=d_model,
        vocab_size=need(raw, "vocab_size"),
        blocks=shared.blocks_of([(mixer, attention)] * layers, SwiGLU(d_model, need(raw, "intermediate_size"))),
        rms_eps=as_float(raw.get("rms_norm_eps", 1e-5), "rms_norm_eps"),
        # one matrix that is multiplied by two numbers is two matrices
        tie_embeddings=tied and several["embedding"] == several["lm_head"] if isinstance(tied, bool) else tied,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=first_id(raw.get("eos_token_id")),
        family="falcon-h1",
        context_length=shared.context_from(raw),
    )


def _multipliers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Every multiplier: numbers by the beginning of their key, lists by their whole key.

    Raises:
        ConfigError: one is no finite number, or a list has another length.
    """
    found: dict[str, Any] = {}
    for name in _SINGLE:
        value = raw.get(f"{name}_multiplier")
        found[name] = 1.0 if value is None else as_float(value, f"{name}_multiplier")
    for key, length in _SEVERAL.items():
        value = raw.get(key)
        value = [1.0] * length if value is None else value
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ConfigError(f"{key} is {value!r}; expected {length} numbers")
        found[key] = [as_float(item, key) for item in value]
    return found


def _folds(raw: Mapping[str, Any], model: Model) -> dict[str, tuple[np.ndarray, ...]]:
    """By role, what its rows are multiplied by, one after another, in fp32."""
    m, mixer = _multipliers(raw), shared.the(model, Mamba2)
    groups = mixer.n_groups * mixer.d_state
    parts = (mixer.d_inner, mixer.d_inner, groups, groups, mixer.n_heads)
    by_role = {
        "gate_proj": (m["mlp_multipliers"][0],),
        "down_proj": (m["mlp_multipliers"][1],),
        "q_proj": (m["attention_in"],),
        "k_proj": (m["key"], m["attention_in"]),
        "v_proj": (m["attention_in"],),
        "o_proj": (m["attention_out"],),
        "out_proj": (m["ssm_out"],),
        "in_proj": (m["ssm_in"], np.repeat(np.array(m["ssm_multipliers"], np.float32), parts)[:, None]),
        "embedding": (m["embedding"],),
        "head": (m["lm_head"],),
    }
    arrays = {role: tuple(np.asarray(value, np.float32) for value in values) for role, values in by_role.items()}
    return {role: values for role, values in arrays.items() if any((value != 1).any() for value in values)}


READERS = ((lambda raw: raw.get("model_type") == "falcon_h1", _from_hf),)


def _to_hf(model: Model) -> dict[str, Any]:
    """The config.json of a `FalconH1ForCausalLM`, all multipliers 1."""
    attention, mixer, mlp = (shared.the(model, kind) for kind in (Attention, Mamba2, SwiGLU))
    keys = shared.model_to_hf(model, "FalconH1ForCausalLM", "falcon_h1")
    keys |= shared.attention_to_hf(attention) | shared.mamba2_to_hf(mixer)
    keys |= {f"{name}_multiplier": 1.0 for name in _SINGLE}
    keys |= {key: [1.0] * length for key, length in _SEVERAL.items()}
    return keys | {
        "head_dim": attention.head_dim,
        "intermediate_size": mlp.d_ff,
        "mamba_d_ssm": mixer.d_inner,
        "mamba_rms_norm": mixer.gate_norm,
        "mamba_norm_before_gate": False,
        "projectors_bias": False,
        "mlp_bias": False,
    }


def _to_gguf(model: Model) -> dict[str, Any]:
    attention, mixer, mlp = (shared.the(model, kind) for kind in (Attention, Mamba2, SwiGLU))
    keys = shared.layer_keys(model, attention, mlp) | shared.mamba2_keys(mixer)
    keys |= {"attention.key_length": attention.head_dim, "attention.value_length": attention.head_dim}
    return keys | {"attention.head_count_kv": attention.n_kv_heads}


def _from_gguf(keys: Keys) -> Model:
    common = keys.common()
    d_model, layers = common["d_model"], keys.whole("block_count")
    whole_number("block_count", layers, MOST_BLOCKS // 2)
    attention = shared.attention_from_keys(keys, d_model, keys.whole("attention.head_count_kv"), "blk.0.")
    mixer = shared.mamba2_from_keys(keys, d_model, "blk.0.ssm_norm.weight" in keys.shapes)
    mlp = SwiGLU(d_model, keys.whole("feed_forward_length"))
    blocks = shared.blocks_of([(mixer, attention)] * layers, mlp)
    return Model(blocks=blocks, context_length=shared.context_from_keys(keys), **common)


FAMILY = Family(
    name="falcon-h1",
    names=shared.layer_names(FILES, "ffn_norm", interleaved=False),  # llama.cpp's loader asks for this name
    to_hf=_to_hf,
    to_gguf=_to_gguf,
    from_gguf=_from_gguf,
    folds=_folds,
)
