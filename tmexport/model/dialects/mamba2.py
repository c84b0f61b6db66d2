"""Pure Mamba-2: Hugging Face `Mamba2ForCausalLM`, `state-spaces/mamba2-*` (mamba_ssm's `MambaConfig`), GGUF `mamba2`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmexport.errors import ConfigError, GGUFError
from tmexport.model.branches.mamba2 import Mamba2
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
    refuse_dt_clamp,
)
from tmexport.model.spec import MOST_BLOCKS, Block, Model, whole_number

DESCRIBED = "'mamba2' (Hugging Face), or d_model and n_layer (state-spaces)"


_NO_TENSOR, _OTHER_SUM = "llama.cpp's mamba2 has no tensor for it", "llama.cpp's mamba2 computes no other"
_PURE = "only pure Mamba-2 is supported"
HF_RULES = (
    Rule("use_bias", (False,), _NO_TENSOR, "a bias of in_proj and out_proj"),
    Rule("use_conv_bias", (True,), "llama.cpp's mamba2 needs ssm_conv1d.bias"),
    Rule("hidden_act", ("silu", "swish"), _OTHER_SUM, "transformers' ACT2FN gives both names the same function"),
)
# Keys that look as if they mattered and do not, each with the evidence; transformers 5.24's modeling_mamba2.py is "the code".
HF_INERT = {
    "norm_before_gate": "the code multiplies by the gate first, always (MambaRMSNormGated); logits of true and false are equal",
    "rms_norm": "the code has no other norm; Mamba-Codestral's file holds it",
    "residual_in_fp32": "where a sum is rounded in half precision; both are the same sum",
    "rescale_prenorm_residual": "read by _init_weights alone",
    "initializer_range": "read by _init_weights alone",
    "time_step_min": "read by _init_weights alone",
    "time_step_max": "read by _init_weights alone",
    "time_step_floor": "read by _init_weights alone",
    "time_step_rank": "stored, never read again",
    "chunk_size": "how the scan is cut, not what it sums",
    "use_cache": "how it is called",
}
SSM_CFG_RULES = (
    Rule("bias", (False,), _NO_TENSOR),
    Rule("conv_bias", (True,), "llama.cpp's mamba2 needs ssm_conv1d.bias"),
    Rule("D_has_hdim", (False,), _OTHER_SUM, "a D for every channel"),
    Rule("rmsnorm", (True,), "llama.cpp's mamba2 needs ssm_norm"),
    Rule("norm_before_gate", (False,), _OTHER_SUM, "mamba_ssm's RMSNormGated obeys it, unlike transformers"),
    Rule("d_ssm", (), "an MLP beside the scan is not supported"),
)
STATE_SPACES_RULES = (
    Rule("rms_norm", (True,), _OTHER_SUM, "false is LayerNorm"),
    Rule("d_intermediate", (0,), _PURE, "an MLP after each mixer"),
    Rule("attn_layer_idx", ([],), _PURE),
)


def mamba2_model(
    d_model: int,
    n_layer: int,
    vocab_size: int,
    d_state: int = 128,
    d_conv: int = 4,
    expand: int = 2,
    headdim: int = 64,
    n_groups: int = 1,
    rms_eps: float = 1e-5,
    tie_embeddings: bool = True,
    chunk_size: int = 256,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
) -> Model:
    """A model of n_layer equal Mamba-2 blocks; the names and defaults of mamba_ssm.

    Raises:
        ConfigError: a dimension that cannot be, or two that do not fit.
    """
    whole_number("d_model", d_model)
    whole_number("n_layer", n_layer, MOST_BLOCKS)
    whole_number("expand", expand)
    branch = Mamba2(d_model, expand * d_model, d_state, d_conv, headdim, n_groups, chunk_size)
    blocks = (Block((branch,)),) * n_layer
    return Model(d_model, vocab_size, blocks, rms_eps, tie_embeddings, bos_token_id, eos_token_id)


def from_hf(raw: Mapping[str, Any]) -> Model:
    """The model of a `Mamba2ForCausalLM`'s config.json.

    Raises:
        ConfigError: it cannot be represented.
    """
    for rule in HF_RULES:
        rule.check(raw)
    refuse_dt_clamp(raw.get("time_step_limit"))
    model = mamba2_model(
        d_model=need(raw, "hidden_size"),
        n_layer=need(raw, "num_hidden_layers"),
        vocab_size=need(raw, "vocab_size"),
        d_state=raw.get("state_size", 128),
        d_conv=raw.get("conv_kernel", 4),
        expand=raw.get("expand", 2),
        headdim=raw.get("head_dim", 64),
        n_groups=raw.get("n_groups", 8),  # transformers' default, not mamba_ssm's
        rms_eps=as_float(raw.get("layer_norm_epsilon", 1e-5), "layer_norm_epsilon"),
        tie_embeddings=raw.get("tie_word_embeddings", False),
        chunk_size=raw.get("chunk_size", 256),
        bos_token_id=raw.get("bos_token_id"),
        eos_token_id=first_id(raw.get("eos_token_id")),
    )
    heads, has = raw.get("num_heads"), the_branch(model).n_heads
    if heads is not None and heads != has:
        raise ConfigError(
            f"num_heads is {heads!r}, but expand * hidden_size / head_dim is {has}; expected them to agree"
        )
    return model


def _from_state_spaces(raw: Mapping[str, Any]) -> Model:
    ssm = raw.get("ssm_cfg") or {}
    if not isinstance(ssm, dict):
        raise ConfigError(f"ssm_cfg is a {type(ssm).__name__}; expected a JSON object")
    if ssm.get("layer", "Mamba1") != "Mamba2":
        raise ConfigError(f"ssm_cfg.layer is {ssm.get('layer', 'Mamba1')!r}; expected 'Mamba1' or 'Mamba2'")
    for rule in SSM_CFG_RULES:
        rule.check(ssm)
    for rule in STATE_SPACES_RULES:
        rule.check(raw)
    refuse_dt_clamp(ssm.get("dt_limit"))
    return mamba2_model(
        d_model=raw["d_model"],
        n_layer=raw["n_layer"],
        vocab_size=padded_vocabulary(raw),
        d_state=ssm.get("d_state", 128),
        d_conv=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        headdim=ssm.get("headdim", 64),
        n_groups=ssm.get("ngroups", 1),
        rms_eps=as_float(raw.get("norm_epsilon", 1e-5), "norm_epsilon"),
        tie_embeddings=raw.get("tie_embeddings", True),
        chunk_size=ssm.get("chunk_size", 256),
    )


READERS = (
    (lambda raw: raw.get("model_type", "mamba2" if "num_hidden_layers" in raw else None) == "mamba2", from_hf),
    (lambda raw: "d_model" in raw and "n_layer" in raw, _from_state_spaces),
)


def the_branch(model: Model) -> Mamba2:
    """The one branch that all blocks of a pure Mamba-2 have."""
    (branch,) = model.blocks[0].branches
    assert isinstance(branch, Mamba2), branch.kind
    return branch


def _to_hf(model: Model) -> dict[str, Any]:
    """The config.json of a `Mamba2ForCausalLM`."""
    c = the_branch(model)
    return pure_mamba_config(model, "Mamba2ForCausalLM", c) | {
        "head_dim": c.headdim,
        "num_heads": c.n_heads,
        "n_groups": c.n_groups,
        "chunk_size": c.chunk_size,
    }


def _to_gguf(model: Model) -> dict[str, Any]:
    c = the_branch(model)
    return common_keys(model) | {
        "ssm.conv_kernel": c.d_conv,
        "ssm.inner_size": c.d_inner,
        "ssm.state_size": c.d_state,
        "ssm.time_step_rank": c.n_heads,
        "ssm.group_count": c.n_groups,
    }


def _from_gguf(keys: Keys) -> Model:
    common = keys.common()
    d_model, d_inner, n_heads = common["d_model"], keys.whole("ssm.inner_size"), keys.whole("ssm.time_step_rank")
    if d_inner % d_model or d_inner % n_heads:
        raise GGUFError(
            f"{keys.path}: inner size {d_inner} does not fit embedding length {d_model} and {n_heads} heads"
        )
    branch = Mamba2(
        d_model=d_model,
        d_inner=d_inner,
        d_state=keys.whole("ssm.state_size"),
        d_conv=keys.whole("ssm.conv_kernel"),
        headdim=d_inner // n_heads,
        n_groups=keys.whole("ssm.group_count"),
    )
    n_layer = keys.whole("block_count")
    whole_number("n_layer", n_layer, MOST_BLOCKS)
    return Model(blocks=(Block((branch,)),) * n_layer, **common)


FAMILY = Family(
    name="mamba2",
    names=BACKBONE,
    to_hf=_to_hf,
    to_gguf=_to_gguf,
    from_gguf=_from_gguf,
)
