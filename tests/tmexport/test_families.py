"""Models with attention and MLPs: read as transformers writes them, computed in torch as transformers computes them."""

import json

import numpy as np
import pytest
import torch
import transformers

from qat.model import load_model
from tests.tmexport.families import FAMILIES, save
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError, ConfigError
from tmexport.model import llama_model, load_config, parse_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: (root / name, save(name, root / name)) for name in FAMILIES}


def ids(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 512, shape))


@pytest.mark.parametrize("name", FAMILIES)
def test_torch_computes_what_transformers_computes(saved, name):
    folder, theirs = saved[name]
    ours, tokens = load_model(folder), ids((2, 70))
    with torch.no_grad():
        wanted, found = theirs(tokens, use_cache=False).logits, ours(tokens)
        assert wanted.std() > 0.05
        assert (found - wanted).abs().max() < 1e-4
        states = ours.fresh_states()
        parts = torch.cat([ours(part, states) for part in tokens.split((13, 1, 56), 1)], 1)
        assert (parts - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_what_we_write_is_the_same_model_for_transformers(saved, name, tmp_path):
    folder, theirs = saved[name]
    checkpoint = open_checkpoint(folder)
    write_checkpoint(tmp_path, checkpoint.config, {key: checkpoint.dense(key) for key in checkpoint.names})
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = ids((1, 20))
    with torch.no_grad():
        assert (again.eval()(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4
    assert load_config(tmp_path)[0] == checkpoint.config
    if name == "granite":  # as the published Granite 4 says it: the one form that every release of transformers reads
        written = json.loads((tmp_path / "config.json").read_text())["layer_types"]
        assert written == ["mamba", "mamba", "attention", "mamba"]


def test_every_parameter_of_transformers_is_read(saved):
    for folder, theirs in saved.values():
        config = load_config(folder)[0]
        ours = sum(int(np.prod(tensor.shape)) for tensor in config.tensors.values())
        assert ours == theirs.num_parameters() + (
            0 if config.tie_embeddings == theirs.config.tie_word_embeddings else 512 * 192
        )


SMOLLM2 = {  # the published config.json of SmolLM2-135M-Instruct
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
    "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama", "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "vocab_size": 49152,
}  # fmt: skip


def test_the_published_config_of_smollm2():
    model = parse_config(SMOLLM2)
    wanted = llama_model(576, 30, 49152, 9, 1536, 3, rope_theta=1e5, rms_eps=1e-5, tie_embeddings=True, bos_token_id=1,
                         eos_token_id=2, context_length=8192)  # fmt: skip
    assert model == wanted
    parameters = sum(int(np.prod(tensor.shape)) for tensor in model.tensors.values())
    assert parameters == 134_515_008  # as its model card counts them


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters has rope_type 'llama3'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling has rope_type 'linear'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"sliding_window": 512}, "sliding_window is 512"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"num_key_value_heads": 3}, "4 heads of queries cannot be shared by 3"),
        ("llama", {"head_dim": 33}, "head_dim is 33; expected an even number"),
        ("llama", {"num_hidden_layers": 2**40}, "num_hidden_layers is"),
        ("granite", {"num_local_experts": 8}, "num_local_experts is 8; only 0"),
        ("granite", {"layer_types": ["linear_attention"] * 4}, "needs both"),
        ("granite", {"layer_types": ["linear_attention"]}, "expected 4 of"),
        ("granite", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ("granite", {"mamba_expand": 3}, "mamba_expand is 3"),
        ("granite", {"mamba_n_heads": 7}, "mamba_n_heads is 7"),
        ("granite", {"residual_multiplier": 0.0}, "a multiplier is 0.0"),
        ("granite", {"time_step_limit": [0.0, 0.1]}, "dt is clamped"),
        ("falcon", {"attention_bias": True}, "attention_bias is True"),
        ("falcon", {"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "mamba_norm_before_gate is True"),
        ("falcon", {"ssm_multipliers": [1.0]}, "ssm_multipliers is \\[1.0\\]; expected 5 numbers"),
        ("falcon", {"key_multiplier": "big"}, "key_multiplier is 'big'"),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_with_its_key(saved, name, change, message):
    raw = json.loads((saved[name][0] / "config.json").read_text())
    parse_config(raw)
    with pytest.raises(ConfigError, match=message):
        parse_config(raw | change)


def test_a_fused_tensor_of_another_shape_is_refused(saved, tmp_path):
    folder, _ = saved["granite"]
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"shared_intermediate_size": 128}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="shared_mlp.input_linear.weight has the shape .*; expected 256 rows"):
        open_checkpoint(tmp_path)
