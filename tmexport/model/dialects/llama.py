"""Llama: Hugging Face `LlamaForCausalLM`, GGUF `llama` (q and k with the halves of a head interleaved)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmexport.errors import ConfigError
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mlp import SwiGLU
from tmexport.model.dialects import layers as shared
from tmexport.model.dialects.reading import Family, Keys, Rule, as_float, first_id, need
from tmexport.model.spec import MOST_BLOCKS, Files, Model, whole_number

DESCRIBED = "'llama' (Hugging Face)"
RULES = (*shared.ATTENTION_RULES, Rule("pretraining_tp", (1,), "sums cut in another way"))
FILES = Files(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    layer="model.layers.{}.",
    norms=("input_layernorm.weight", "post_attention_layernorm.weight"),
    branches={"attention": "self_attn.", "swiglu": "mlp."},
)
_SCALES = ("attention.scale", "logit_scale", "residual_scale", "embedding_scale")  # no key of a llama file


def llama_model(
    d_model: int,
    n_layer: int,
    vocab_size: int,
    n_heads: int,
    d_ff: int,
    n_kv_heads: int | None = None,
    head_dim: int | None = None,
    rope_theta: float = shared.DEFAULT_THETA,
    bias: bool = False,
    rms_eps: float = 1e-6,
    tie_embeddings: bool = False,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    context_length: int | None = None,
) -> Model:
    """A model of n_layer equal layers, each attention and SwiGLU; the defaults of transformers.

    Raises:
        ConfigError: a dimension that cannot be, or two that do not fit.
    """
    whole_number("n_layer", n_layer, MOST_BLOCKS // 2)
    raw = {"hidden_size": d_model, "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads}
    raw |= {"head_dim": head_dim, "attention_bias": bias}
    attention = shared.attention_from(raw, shared.single(rope_theta, "rope_theta"))
    blocks = shared.blocks_of([(attention,)] * n_layer, SwiGLU(d_model, d_ff))
    return Model(
        d_model, vocab_size, blocks, rms_eps, tie_embeddings, bos_token_id, eos_token_id, "llama",
        context_length=context_length,
    )  # fmt: skip


def _from_hf(raw: Mapping[str, Any]) -> Model:
    shared.check_rules(raw, RULES)
    return llama_model(
        d_model=need(raw, "hidden_size"),
        n_layer=shared.layer_count(raw),
        vocab_size=need(raw, "vocab_size"),
        n_heads=need(raw, "num_attention_heads"),
        d_ff=need(raw, "intermediate_size"),
        n_kv_heads=raw.get("num_key_value_heads"),
        head_dim=raw.get("head_dim"),
        rope_theta=shared.rope_theta(raw),
        bias=raw.get("attention_bias") or False,
        rms_eps=as_float(raw.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=first_id(raw.get("eos_token_id")),
        context_length=shared.context_from(raw),
    )


READERS = ((lambda raw: raw.get("model_type") == "llama", _from_hf),)


def _to_hf(model: Model) -> dict[str, Any]:
    """The config.json of a `LlamaForCausalLM`."""
    attention, mlp = shared.the(model, Attention), shared.the(model, SwiGLU)
    keys = shared.model_to_hf(model, "LlamaForCausalLM", "llama") | shared.attention_to_hf(attention)
    return keys | {"head_dim": attention.head_dim, "intermediate_size": mlp.d_ff, "mlp_bias": False}


def _to_gguf(model: Model) -> dict[str, Any]:
    attention, mlp = shared.the(model, Attention), shared.the(model, SwiGLU)
    keys = shared.layer_keys(model, attention, mlp) | {"attention.head_count_kv": attention.n_kv_heads}
    if attention.head_dim * attention.n_heads != model.d_model:
        keys |= {"attention.key_length": attention.head_dim, "attention.value_length": attention.head_dim}
    return keys


def _from_gguf(keys: Keys) -> Model:
    common = keys.common()
    for key in _SCALES:
        if shared.number(keys, key, 1.0) != 1.0:
            raise ConfigError(f"llama.{key} is {keys.metadata[f'llama.{key}']!r}; expected none (a Granite's file?)")
    d_model, n_layer = common["d_model"], keys.whole("block_count")
    whole_number("block_count", n_layer, MOST_BLOCKS // 2)
    has_kv = "attention.head_count_kv" in keys.here
    kv_heads = keys.whole("attention.head_count_kv" if has_kv else "attention.head_count")
    attention = shared.attention_from_keys(keys, d_model, kv_heads, "blk.0.")
    blocks = shared.blocks_of([(attention,)] * n_layer, SwiGLU(d_model, keys.whole("feed_forward_length")))
    return Model(blocks=blocks, context_length=shared.context_from_keys(keys), **common)


FAMILY = Family(
    name="llama",
    names=shared.layer_names(FILES, "ffn_norm.weight", interleaved=True),
    to_hf=_to_hf,
    to_gguf=_to_gguf,
    from_gguf=_from_gguf,
)
