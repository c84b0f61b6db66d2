"""What the families of layers share (a mixer, then an MLP: two blocks a layer): names, positions, keys of both formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tmexport.errors import ConfigError, GGUFError
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.branches.mlp import SwiGLU
from tmexport.model.dialects.reading import BACKBONE, Keys, Rule, as_float, need
from tmexport.model.spec import MOST_BLOCKS, Block, Branch, Files, Model, Names, shown, whole_number

DEFAULT_THETA = 10000.0
# what changes attention's arithmetic and no family here has; each key with what it would mean
ATTENTION_RULES = (
    Rule("hidden_act", ("silu", "swish"), "the MLP computes silu(gate) * up"),
    Rule("mlp_bias", (False,), "the MLP has no biases here"),
    Rule("sliding_window", (), "attention here sees every position"),
    Rule("use_sliding_window", (False,), "attention here sees every position"),
    Rule("attn_logit_softcapping", (), "attention here has no cap"),
    Rule("use_qk_norm", (False,), "attention here has no norm of q and k"),
    Rule("qk_norm", (False,), "attention here has no norm of q and k"),
    Rule("qk_layernorm", (False,), "attention here has no norm of q and k"),
    Rule("partial_rotary_factor", (1.0, 1), "RoPE turns whole heads here"),
    Rule("rope_interleaved", (False,), "RoPE turns the halves of a head here"),
)


def layer_names(files: Files, ffn_norm: str, interleaved: bool) -> Names:
    """The names of a family of layers; ffn_norm: what a GGUF calls the norm before the MLP."""
    return replace(BACKBONE, norms=("attn_norm.weight", ffn_norm), branch=None, files=files, interleaved=interleaved)


def single(value: Any, name: str) -> float:
    """A number as fp32 holds it, which is what a GGUF stores; as the shortest decimal that says it."""
    return float(str(np.float32(as_float(value, name))))


def check_rules(raw: Mapping[str, Any], rules: tuple[Rule, ...]) -> None:
    """Raises ConfigError at the first key that cannot be represented."""
    for rule in rules:
        rule.check(raw)


def layer_count(raw: Mapping[str, Any]) -> int:
    """num_hidden_layers, of which each is two blocks."""
    layers = need(raw, "num_hidden_layers")
    whole_number("num_hidden_layers", layers, MOST_BLOCKS // 2)
    return layers


def rope_theta(raw: Mapping[str, Any]) -> float:
    """The base of RoPE's frequencies: transformers 5 says it in rope_parameters, older files beside rope_scaling.

    Raises:
        ConfigError: the frequencies or the positions are scaled.
    """
    for key in ("rope_parameters", "rope_scaling"):
        found = raw.get(key)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            raise ConfigError(f"{key} is {shown(found)}; expected a JSON object")
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{key} has rope_type {kind!r}; only 'default' can be represented (scaled positions)")
        if found.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{key} has partial_rotary_factor {found['partial_rotary_factor']!r}; only 1.0 can be represented")  # fmt: skip
        if "rope_theta" in found:
            return single(found["rope_theta"], "rope_theta")
    return single(raw.get("rope_theta", DEFAULT_THETA) or DEFAULT_THETA, "rope_theta")


def attention_from(raw: Mapping[str, Any], theta: float | None, scale: float | None = None) -> Attention:
    """The attention that a config.json describes; scale: None is 1 / sqrt(head_dim)."""
    d_model, heads = need(raw, "hidden_size"), need(raw, "num_attention_heads")
    whole_number("hidden_size", d_model)
    whole_number("num_attention_heads", heads)
    head_dim = raw.get("head_dim")
    if head_dim is None:
        if d_model % heads:
            raise ConfigError(f"hidden_size {d_model} cannot be shared by {heads} heads")
        head_dim = d_model // heads
    whole_number("head_dim", head_dim)
    kv = raw.get("num_key_value_heads")
    scale = default_scale(head_dim) if scale is None else scale
    return Attention(d_model, heads, heads if kv is None else kv, head_dim, scale, theta, raw.get("attention_bias") or False)  # fmt: skip


def default_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim), as fp32 holds it."""
    return single(head_dim**-0.5, "scale")


def context_from(raw: Mapping[str, Any]) -> int | None:
    """max_position_embeddings."""
    return raw.get("max_position_embeddings")


def attention_to_hf(branch: Attention) -> dict[str, Any]:
    """The keys of `attention_from`, but for its scale."""
    keys: dict[str, Any] = {
        "num_attention_heads": branch.n_heads,
        "num_key_value_heads": branch.n_kv_heads,
        "attention_bias": branch.bias,
    }
    if branch.rope_theta is not None:
        keys |= {"rope_theta": branch.rope_theta}
        keys |= {"rope_parameters": {"rope_type": "default", "rope_theta": branch.rope_theta}}
    return keys


def model_to_hf(model: Model, architecture: str, model_type: str) -> dict[str, Any]:
    """The keys that every class of transformers has."""
    keys = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layer // 2,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.rms_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": None,
        "hidden_act": "silu",
    }
    return keys if model.context_length is None else keys | {"max_position_embeddings": model.context_length}


def mamba2_from(raw: Mapping[str, Any], d_inner: Any, gate_norm: bool = True) -> Mamba2:
    """The mixer that the keys mamba_* of a config.json describe."""
    whole_number("mamba_expand * hidden_size", d_inner)
    heads, width = need(raw, "mamba_n_heads"), raw.get("mamba_d_head", "auto")
    whole_number("mamba_n_heads", heads)
    if d_inner % heads or (width != "auto" and width * heads != d_inner):
        raise ConfigError(f"mamba_n_heads is {heads} and mamba_d_head {width!r}, but they share {d_inner} channels")
    return Mamba2(
        d_model=need(raw, "hidden_size"),
        d_inner=d_inner,
        d_state=need(raw, "mamba_d_state"),
        d_conv=raw.get("mamba_d_conv", 4),
        headdim=d_inner // heads,
        n_groups=raw.get("mamba_n_groups", 1),
        chunk_size=raw.get("mamba_chunk_size", 256),
        gate_norm=gate_norm,
    )


def mamba2_to_hf(branch: Mamba2) -> dict[str, Any]:
    """The keys mamba_*, but for those that only one family has."""
    return {
        "mamba_d_state": branch.d_state,
        "mamba_d_conv": branch.d_conv,
        "mamba_d_head": branch.headdim,
        "mamba_n_heads": branch.n_heads,
        "mamba_n_groups": branch.n_groups,
        "mamba_chunk_size": branch.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
    }


def layer_keys(model: Model, attention: Attention, mlp: SwiGLU) -> dict[str, Any]:
    """The GGUF keys that llama.cpp wants of every model with attention."""
    return {
        "context_length": model.context_length or 2**20,
        "embedding_length": model.d_model,
        "block_count": model.n_layer // 2,
        "feed_forward_length": mlp.d_ff,
        "attention.head_count": attention.n_heads,
        "attention.layer_norm_rms_epsilon": model.rms_eps,
        "vocab_size": model.vocab_size,
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": attention.rope_theta or DEFAULT_THETA,
    }


def mamba2_keys(branch: Mamba2) -> dict[str, Any]:
    """The GGUF keys ssm.*."""
    return {
        "ssm.conv_kernel": branch.d_conv,
        "ssm.inner_size": branch.d_inner,
        "ssm.state_size": branch.d_state,
        "ssm.time_step_rank": branch.n_heads,
        "ssm.group_count": branch.n_groups,
    }


def mamba2_from_keys(keys: Keys, d_model: int, gate_norm: bool = True) -> Mamba2:
    """The mixer that the keys ssm.* describe."""
    d_inner, heads = keys.whole("ssm.inner_size"), keys.whole("ssm.time_step_rank")
    if d_inner % heads:
        raise GGUFError(f"{keys.path}: inner size {d_inner} cannot be shared by {heads} heads")
    return Mamba2(
        d_model=d_model,
        d_inner=d_inner,
        d_state=keys.whole("ssm.state_size"),
        d_conv=keys.whole("ssm.conv_kernel"),
        headdim=d_inner // heads,
        n_groups=keys.whole("ssm.group_count"),
        gate_norm=gate_norm,
    )


def number(keys: Keys, key: str, default: float) -> float:
    """A positive number under "ARCHITECTURE.key"; 0 counts as not there, as in llama.cpp."""
    value = keys.metadata.get(f"{keys.architecture}.{key}")
    return default if value is None or value == 0 else single(value, key)


def attention_from_keys(keys: Keys, d_model: int, kv_heads: int, first: str, has_rope: bool = True) -> Attention:
    """The attention that the keys describe; first: the GGUF prefix of a layer that has one ("blk.3.").

    Raises:
        GGUFError: heads of keys and values of different widths, scaled positions, a window.
    """
    heads = keys.whole("attention.head_count")
    if "attention.key_length" not in keys.here and d_model % heads:
        raise GGUFError(f"{keys.path}: embedding length {d_model} cannot be shared by {heads} heads")
    head_dim = keys.whole("attention.key_length") if "attention.key_length" in keys.here else d_model // heads
    same: dict[str, Any] = {
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "attention.sliding_window": 0,
    }
    same |= {"expert_count": 0, "rope.scaling.type": "none", "attention.clamp_kqv": 0.0, "attention.causal": True}
    for key, value in same.items():
        found = keys.metadata.get(f"{keys.architecture}.{key}", value)
        if found != value:
            raise GGUFError(f"{keys.path}: {keys.architecture}.{key} is {found!r}; expected {value!r} or none")
    theta = number(keys, "rope.freq_base", DEFAULT_THETA) if has_rope else None
    scale = number(keys, "attention.scale", default_scale(head_dim))
    bias = f"{first}attn_q.bias" in keys.shapes
    return Attention(d_model, heads, kv_heads, head_dim, scale, theta, bias)


def context_from_keys(keys: Keys) -> int | None:
    """Positions the model was trained for."""
    found = keys.whole("context_length")
    return None if found == 2**20 else found


def blocks_of(mixers: list[tuple[Branch, ...]], mlp: SwiGLU, multiplier: float = 1.0) -> tuple[Block, ...]:
    """Two blocks a layer: the mixers of each, then the MLP."""
    return tuple(block for mixer in mixers for block in (Block(mixer, multiplier), Block((mlp,), multiplier)))


def the(model: Model, kind: type[Branch]) -> Any:
    """The one set of dimensions that all branches of a kind have.

    Raises:
        ConfigError: none is there, or they differ.
    """
    found = {branch for block in model.blocks for branch in block.branches if isinstance(branch, kind)}
    if len(found) != 1:
        raise ConfigError(
            f"the layers have {len(found)} different {kind.kind} branches; the family {model.family!r} says one"
        )
    return found.pop()
