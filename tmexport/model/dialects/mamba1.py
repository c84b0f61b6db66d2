"""Pure Mamba-1: Hugging Face `MambaForCausalLM`, `state-spaces/mamba-*` (mamba_ssm's `MambaConfig`), GGUF `mamba`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmexport.errors import ConfigError, GGUFError
from tmexport.model.branches.mamba1 import Mamba1
from tmexport.model.dialects.reading import (
    BACKBONE,
    Family,
    Keys,
    Rule,
    as_float,
    common_keys,
    first_id,
    need,
    padded_vocabulary,
    pure_mamba_config,
)
from tmexport.model.spec import MOST_BLOCKS, Block, Model, whole_number

DESCRIBED = "'mamba' (Hugging Face)"
_NO_TENSOR, _OTHER_SUM = "llama.cpp's mamba has no tensor for it", "llama.cpp's mamba computes no other"
HF_RULES = (
    Rule("use_bias", (False,), _NO_TENSOR, "a bias of in_proj and out_proj"),
    Rule("use_conv_bias", (True,), "llama.cpp's mamba needs ssm_conv1d.bias"),
    Rule("hidden_act", ("silu", "swish"), _OTHER_SUM, "transformers' ACT2FN gives both names the same function"),
)
SSM_CFG_RULES = (
    Rule("bias", (False,), _NO_TENSOR),
    Rule("conv_bias", (True,), "llama.cpp's mamba needs ssm_conv1d.bias"),
)
STATE_SPACES_RULES = (
    Rule("rms_norm", (True,), _OTHER_SUM, "false is LayerNorm"),
    Rule("d_intermediate", (0,), "only pure Mamba-1 is supported", "an MLP after each mixer"),
    Rule("attn_layer_idx", ([],), "only pure Mamba-1 is supported"),
)


def mamba1_model(
    d_model: int,
    n_layer: int,
    vocab_size: int,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int = 2,
    dt_rank: int | None = None,
    rms_eps: float = 1e-5,
    tie_embeddings: bool = True,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Model:
    """A model of n_layer equal Mamba-1 blocks; the names and defaults of mamba_ssm (dt_rank: a sixteenth of d_model).

    Raises:
        ConfigError: a dimension that cannot be.
    """
    whole_number("d_model", d_model)
    whole_number("n_layer", n_layer, MOST_BLOCKS)
    whole_number("expand", expand)
    if expand != 2:
        raise ConfigError(f"expand is {expand}; only 2 can be represented (llama.cpp's mamba has no other)")
    branch = Mamba1(d_model, expand * d_model, -(-d_model // 16) if dt_rank is None else dt_rank, d_state, d_conv)
    blocks = (Block((branch,)),) * n_layer
    return Model(d_model, vocab_size, blocks, rms_eps, tie_embeddings, bos_token_id, eos_token_id, family="mamba")


def _rank(value: Any) -> Any:
    """Both dialects write "auto" for the default."""
    return None if value == "auto" else value


def _from_hf(raw: Mapping[str, Any]) -> Model:
    for rule in HF_RULES:
        rule.check(raw)
    model = mamba1_model(
        d_model=need(raw, "hidden_size"),
        n_layer=need(raw, "num_hidden_layers"),
        vocab_size=need(raw, "vocab_size"),
        d_state=raw.get("state_size", 16),
        d_conv=raw.get("conv_kernel", 4),
        expand=raw.get("expand", 2),
        dt_rank=_rank(raw.get("time_step_rank", "auto")),
        rms_eps=as_float(raw.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon"),
        tie_embeddings=raw.get("tie_word_embeddings", True),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=first_id(raw.get("eos_token_id")),
    )
    inner, has = raw.get("intermediate_size"), _branch(model).d_inner
    if inner is not None and inner != has:
        raise ConfigError(f"intermediate_size is {inner!r}, but expand * hidden_size is {has}; expected them to agree")
    return model


def _from_state_spaces(raw: Mapping[str, Any]) -> Model:
    ssm = raw.get("ssm_cfg") or {}
    for rule in SSM_CFG_RULES:
        rule.check(ssm)
    for rule in STATE_SPACES_RULES:
        rule.check(raw)
    return mamba1_model(
        d_model=raw["d_model"],
        n_layer=raw["n_layer"],
        vocab_size=padded_vocabulary(raw),
        d_state=ssm.get("d_state", 16),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        dt_rank=_rank(ssm.get("dt_rank", "auto")),
        rms_eps=as_float(raw.get("norm_epsilon", 1e-5), "norm_epsilon"),
        tie_embeddings=raw.get("tie_embeddings", True),
    )


def _is_state_spaces(raw: Mapping[str, Any]) -> bool:
    """mamba_ssm writes no layer for its first kind of mixer; what is no object is left to the reader of the second."""
    ssm = raw.get("ssm_cfg") or {}
    return "d_model" in raw and "n_layer" in raw and isinstance(ssm, dict) and ssm.get("layer", "Mamba1") == "Mamba1"


READERS = ((lambda raw: raw.get("model_type") == "mamba", _from_hf), (_is_state_spaces, _from_state_spaces))


def _branch(model: Model) -> Mamba1:
    """The one branch that all blocks of a pure Mamba-1 have."""
    (branch,) = model.blocks[0].branches
    assert isinstance(branch, Mamba1), branch.kind
    return branch


def _to_hf(model: Model) -> dict[str, Any]:
    """The config.json of a `MambaForCausalLM`."""
    c = _branch(model)
    return pure_mamba_config(model, "MambaForCausalLM", c) | {
        "intermediate_size": c.d_inner,
        "time_step_rank": c.dt_rank,
    }


def _to_gguf(model: Model) -> dict[str, Any]:
    c = _branch(model)
    return common_keys(model) | {
        "ssm.conv_kernel": c.d_conv,
        "ssm.inner_size": c.d_inner,
        "ssm.state_size": c.d_state,
        "ssm.time_step_rank": c.dt_rank,
        "ssm.dt_b_c_rms": False,
    }


def _from_gguf(keys: Keys) -> Model:
    common = keys.common()
    d_inner = keys.whole("ssm.inner_size")
    if d_inner != 2 * common["d_model"]:
        raise GGUFError(f"{keys.path}: inner size {d_inner} is not twice the embedding length {common['d_model']}")
    if keys.metadata.get(f"{keys.architecture}.ssm.dt_b_c_rms"):
        raise GGUFError(f"{keys.path}: normalises dt, B and C (FalconMamba), which cannot be computed here")
    branch = Mamba1(
        d_model=common["d_model"],
        d_inner=d_inner,
        dt_rank=keys.whole("ssm.time_step_rank"),
        d_state=keys.whole("ssm.state_size"),
        d_conv=keys.whole("ssm.conv_kernel"),
    )
    n_layer = keys.whole("block_count")
    whole_number("n_layer", n_layer, MOST_BLOCKS)
    return Model(blocks=(Block((branch,)),) * n_layer, **common)


FAMILY = Family(
    name="mamba",
    names=BACKBONE,
    to_hf=_to_hf,
    to_gguf=_to_gguf,
    from_gguf=_from_gguf,
)
