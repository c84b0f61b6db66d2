"""Dimensions from each dialect, and the models that cannot be represented."""

import pytest
import torch
import transformers

from tests.models import mixer
from tmexport.errors import ConfigError
from tmexport.model import load_config, mamba2_model, parse_config
from tmexport.model.dialects.mamba2 import HF_INERT, HF_RULES, SSM_CFG_RULES, STATE_SPACES_RULES

# state-spaces/mamba2-130m's config.json, as published
PUBLISHED_130M = {
    "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [],
    "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}  # fmt: skip


def test_the_published_130m_config():
    config = parse_config(PUBLISHED_130M)
    assert config == mamba2_model(d_model=768, n_layer=24, vocab_size=50288)
    assert (mixer(config).d_inner, mixer(config).n_heads, mixer(config).d_in_proj) == (
        1536,
        24,
        3352,
    )  # shapes of the published weights


def test_hugging_face_reads_the_config_we_write_the_same_way(tmp_path):
    config = mamba2_model(256, 3, 640, d_state=64, n_groups=2, rms_eps=1e-6, tie_embeddings=False, eos_token_id=0)
    theirs = transformers.Mamba2Config(**config.to_hf())
    theirs.save_pretrained(tmp_path)
    assert load_config(tmp_path)[0] == config
    model = transformers.Mamba2Model(theirs)
    assert model.layers[0].mixer.in_proj.weight.shape == (mixer(config).d_in_proj, config.d_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_step_limit": [0.0, 0.1]}, "dt is clamped"),
        ({"use_bias": True}, "use_bias is True"),
        ({"use_conv_bias": False}, "use_conv_bias is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_size": -1}, "d_model is -1"),
        ({"hidden_size": 2**40}, "d_model is 1099511627776"),
        ({"hidden_size": 256.0}, "d_model is 256.0"),
        ({"num_heads": 7}, "num_heads is 7"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon is 'small'"),
        ({"head_dim": 60}, "not a multiple of headdim 60"),
        ({"n_groups": 3}, "cannot be shared by 3 groups"),
        ({"eos_token_id": 5000}, "eos_token_id is 5000"),
        ({"num_hidden_layers": None}, "n_layer is None"),
        ({"model_type": "gpt2"}, "another type: model_type is 'gpt2'; expected 'mamba'"),
    ],
)
def test_what_cannot_be_represented_is_refused(change, message):
    raw = mamba2_model(256, 2, 512, d_state=64).to_hf() | change
    with pytest.raises(ConfigError, match=message):
        parse_config(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer is 'Mamba3'; expected 'Mamba1' or 'Mamba2'"),
        ({"attn_layer_idx": [3]}, "only pure Mamba-2"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim is True"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 0.5]}}, "dt is clamped"),
        ({"d_intermediate": 1024}, "d_intermediate is 1024"),
        ({"vocab_size": "many"}, "vocab_size 'many'"),
    ],
)
def test_state_spaces_variants_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(PUBLISHED_130M | change)


def test_a_config_that_is_not_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read as JSON"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nowhere")


# a value other than the default, for every key that we say does not matter
INERT = {
    "norm_before_gate": True, "rms_norm": True, "residual_in_fp32": False, "rescale_prenorm_residual": True, "initializer_range": 0.5,
    "time_step_min": 0.01, "time_step_max": 0.5, "time_step_floor": 0.01, "time_step_rank": 7, "chunk_size": 8, "use_cache": False,
}  # fmt: skip


def _logits(raw, state=None):
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**raw)).eval()
    if state is not None:
        model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.arange(1, 21)[None]).logits, model.state_dict()


def test_keys_that_do_not_matter_load_and_are_inert_in_transformers():
    assert set(INERT) == set(HF_INERT)
    raw = mamba2_model(64, 2, 32, d_state=16, headdim=32).to_hf()
    expected, state = _logits(raw)
    for key, value in INERT.items():
        assert parse_config(raw | {key: value}).tensors == parse_config(raw).tensors
        tolerance = 1e-5 if key == "chunk_size" else 0.0  # the same sum, in another order
        assert (_logits(raw | {key: value}, state)[0] - expected).abs().max() <= tolerance, key


@pytest.mark.parametrize(("value", "wanted"), [([3, 1], 3), ([], None), (None, None), (5, 5)])
def test_end_tokens_of_a_config(value, wanted):
    assert parse_config(mamba2_model(256, 2, 512, d_state=64).to_hf() | {"eos_token_id": value}).eos_token_id == wanted


def test_swish_is_silu_in_transformers():
    raw = mamba2_model(64, 2, 32, d_state=16, headdim=32).to_hf()
    expected, state = _logits(raw)
    assert parse_config(raw | {"hidden_act": "swish"}) == parse_config(raw)
    assert torch.equal(_logits(raw | {"hidden_act": "swish"}, state)[0], expected)


@pytest.mark.parametrize(
    ("place", "rule"),
    [(place, rule) for place, rules in (("hf", HF_RULES), ("ssm", SSM_CFG_RULES), ("top", STATE_SPACES_RULES)) for rule in rules],
    ids=lambda x: getattr(x, "key", x),
)  # fmt: skip
def test_every_rule_lets_its_values_pass_and_refuses_another(place, rule):
    def described(value):
        if place == "hf":
            return mamba2_model(256, 2, 512, d_state=64).to_hf() | {rule.key: value}
        change = {rule.key: value} if place == "top" else {"ssm_cfg": {"layer": "Mamba2", rule.key: value}}
        return PUBLISHED_130M | change

    for value in (*rule.allowed, None):
        parse_config(described(value))
    for value in ("gelu", 7, [1]):
        with pytest.raises(ConfigError, match=f"{rule.key} is .*can be represented"):
            parse_config(described(value))


def test_a_model_of_another_type_is_named_even_if_it_has_the_keys():
    gpt2 = {"model_type": "gpt2", "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
    with pytest.raises(ConfigError, match="another type: model_type is 'gpt2'"):
        parse_config(gpt2)
