"""Granite-4.0-H without experts: Hugging Face `GraniteMoeHybridForCausalLM` with num_local_experts 0, GGUF `granitehybrid`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmexport.errors import ConfigError, GGUFError
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.branches.mlp import SwiGLU
from tmexport.model.dialects import layers as shared
from tmexport.model.dialects.reading import Family, Keys, Rule, as_float, first_id, need, refuse_dt_clamp
from tmexport.model.spec import MOST_BLOCKS, Branch, Files, Model, whole_number

DESCRIBED = "'granitemoehybrid' (Hugging Face)"
RULES = (
    *shared.ATTENTION_RULES,
    Rule("mamba_conv_bias", (True,), "the convolution has a bias here"),
    Rule("mamba_proj_bias", (False,), "llama.cpp's granitehybrid has no tensor for it"),
    Rule("mamba_expand", (2,), "llama.cpp's granitehybrid has no other"),
    Rule("normalization_function", ("rmsnorm",), "llama.cpp's granitehybrid computes no other"),
)
# As published and as transformers 5.14 renames them while reading. The older read the first only (5.6: others in silence).
_MAMBA, _ATTENTION = ("mamba", "linear_attention"), ("attention", "full_attention")
FILES = Files(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    layer="model.layers.{}.",
    norms=("input_layernorm.weight", "post_attention_layernorm.weight"),
    branches={"attention": "self_attn.", "mamba2": "mamba."},
    other={
        "gate_proj": ("shared_mlp.input_linear.weight", 0, 2),
        "up_proj": ("shared_mlp.input_linear.weight", 1, 2),
        "down_proj": ("shared_mlp.output_linear.weight", 0, 1),
    },
)


def _is_mamba(raw: Mapping[str, Any], layers: int) -> list[bool]:
    """For each layer whether it is Mamba-2, not attention.

    Raises:
        ConfigError: another kind of layer, or only one: llama.cpp's granitehybrid aborts without the other.
    """
    kinds = raw.get("layer_types", raw.get("layers_block_type"))
    known = (*_MAMBA, *_ATTENTION)
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
        raise ConfigError(f"layer_types is {kinds!r}; expected {layers} of {', '.join(map(repr, known))}")
    found = [kind in _MAMBA for kind in kinds]
    if len(set(found)) != 2:
        raise ConfigError(
            f"layer_types is {kinds[0]!r} alone; expected Mamba-2 and attention (llama.cpp's granitehybrid needs both)"
        )
    return found


def _from_hf(raw: Mapping[str, Any]) -> Model:
    shared.check_rules(raw, RULES)
    if raw.get("num_local_experts", 8) != 0:  # transformers' default
        raise ConfigError(
            f"num_local_experts is {raw.get('num_local_experts', 8)!r}; only 0 can be represented (a mixture of experts)"
        )
    refuse_dt_clamp(raw.get("time_step_limit"))
    positions = raw.get("position_embedding_type")
    if positions not in ("rope", "nope", None):
        raise ConfigError(f"position_embedding_type is {positions!r}; expected 'rope', 'nope' or null")
    d_model, layers = need(raw, "hidden_size"), shared.layer_count(raw)
    whole_number("hidden_size", d_model)
    theta = shared.rope_theta(raw) if positions == "rope" else None
    scale = shared.single(raw.get("attention_multiplier", 1.0), "attention_multiplier")
    attention = shared.attention_from({**raw, "head_dim": None}, theta, scale)
    mixer = shared.mamba2_from(raw, 2 * d_model)
    mixers: list[tuple[Branch, ...]] = [(mixer if mamba else attention,) for mamba in _is_mamba(raw, layers)]
    mlp = SwiGLU(d_model, need(raw, "shared_intermediate_size"))
    return Model(
        d_model=d_model,
        vocab_size=need(raw, "vocab_size"),
        blocks=shared.blocks_of(mixers, mlp, _multiplier(raw, "residual_multiplier")),
        rms_eps=as_float(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=first_id(raw.get("eos_token_id")),
        family="granitehybrid",
        embedding_multiplier=_multiplier(raw, "embedding_multiplier"),
        logits_divisor=_multiplier(raw, "logits_scaling"),
        context_length=shared.context_from(raw),
    )


def _multiplier(raw: Mapping[str, Any], key: str) -> float:
    return shared.single(raw.get(key, 1.0), key)


READERS = ((lambda raw: raw.get("model_type") == "granitemoehybrid", _from_hf),)


def _to_hf(model: Model) -> dict[str, Any]:
    """The config.json of a `GraniteMoeHybridForCausalLM`."""
    attention, mixer, mlp = (shared.the(model, kind) for kind in (Attention, Mamba2, SwiGLU))
    is_attention = [isinstance(block.branches[0], Attention) for block in model.blocks[::2]]
    keys = shared.model_to_hf(model, "GraniteMoeHybridForCausalLM", "granitemoehybrid")
    keys |= shared.attention_to_hf(attention) | shared.mamba2_to_hf(mixer)
    return keys | {
        "layer_types": [_ATTENTION[0] if found else _MAMBA[0] for found in is_attention],
        "position_embedding_type": None if attention.rope_theta is None else "rope",
        "num_local_experts": 0,
        "intermediate_size": mlp.d_ff,
        "shared_intermediate_size": mlp.d_ff,
        "mamba_expand": 2,
        "attention_multiplier": attention.scale,
        "residual_multiplier": model.blocks[0].multiplier,
        "embedding_multiplier": model.embedding_multiplier,
        "logits_scaling": model.logits_divisor,
    }


def _to_gguf(model: Model) -> dict[str, Any]:
    attention, mixer, mlp = (shared.the(model, kind) for kind in (Attention, Mamba2, SwiGLU))
    kv = [attention.n_kv_heads if isinstance(b.branches[0], Attention) else 0 for b in model.blocks[::2]]
    keys = shared.layer_keys(model, attention, mlp) | shared.mamba2_keys(mixer)
    return keys | {
        "attention.head_count_kv": kv,
        "attention.scale": attention.scale,
        "embedding_scale": model.embedding_multiplier,
        "residual_scale": model.blocks[0].multiplier,
        "logit_scale": model.logits_divisor,
        "rope.scaling.finetuned": attention.rope_theta is not None,
    }


def _from_gguf(keys: Keys) -> Model:
    common = keys.common()
    d_model, layers = common["d_model"], keys.whole("block_count")
    whole_number("block_count", layers, MOST_BLOCKS // 2)
    kv = keys.metadata.get("granitehybrid.attention.head_count_kv")
    if isinstance(kv, int | float | str) or kv is None or len(kv) != layers or len(set(kv)) != 2 or min(kv) != 0:
        raise GGUFError(
            f"{keys.path}: granitehybrid.attention.head_count_kv is {kv!r}; expected {layers} numbers, 0 for Mamba-2"
        )
    first = next(number for number, heads in enumerate(kv) if heads)
    has_rope = keys.metadata.get("granitehybrid.rope.scaling.finetuned", True)
    attention = shared.attention_from_keys(keys, d_model, max(kv), f"blk.{first}.", bool(has_rope))
    mixer = shared.mamba2_from_keys(keys, d_model)
    if mixer.d_inner != 2 * d_model:
        raise GGUFError(f"{keys.path}: inner size {mixer.d_inner} is not twice the embedding length {d_model}")
    mixers: list[tuple[Branch, ...]] = [(attention if heads else mixer,) for heads in kv]
    mlp = SwiGLU(d_model, keys.whole("feed_forward_length"))
    return Model(
        blocks=shared.blocks_of(mixers, mlp, shared.number(keys, "residual_scale", 1.0)),
        embedding_multiplier=shared.number(keys, "embedding_scale", 1.0),
        logits_divisor=shared.number(keys, "logit_scale", 1.0),
        context_length=shared.context_from_keys(keys),
        **common,
    )


FAMILY = Family(
    name="granitehybrid",
    names=shared.layer_names(FILES, "ffn_norm.weight", interleaved=True),
    to_hf=_to_hf,
    to_gguf=_to_gguf,
    from_gguf=_from_gguf,
)
