"""GGUF files of models with attention: what llama.cpp's converter writes, and what a stock llama.cpp computes from it."""

import json

import gguf
import numpy as np
import pytest
import torch

from qat.model import load_model
from qat.ptq.making import make
from tests.llama import Llama
from tests.models import train_tokenizer
from tests.tmexport.families import FAMILIES, save
from tmexport.checkpoint import open_checkpoint
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import config_from_metadata
from tmexport.gguf.reader import open_gguf
from tmexport.verify import verify_gguf

PROMPTS = ("Fellow citizens of the Senate", "The war", "Our commerce with", "In the year 1861 the", "peace and")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    models = {}
    for name in FAMILIES:
        models[name] = (root / name, save(name, root / name))
        train_tokenizer(root / name / "tokenizer.json")
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
        plan_export(open_checkpoint(root / name), "f16").write(root / f"{name}.gguf", lambda tensor: None)
    return models


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_is_verified_and_says_the_same_model(saved, name):
    folder, _ = saved[name]
    checkpoint, file = open_checkpoint(folder), open_gguf(folder.with_suffix(".gguf"))
    report = verify_gguf(checkpoint, file)
    assert (report.difference, report.other_tensors) == (None, len(checkpoint.config.tensors))
    model = config_from_metadata(file)
    assert len(model.blocks) == len(checkpoint.config.blocks)
    assert file.metadata["tokenizer.chat_template"] == TEMPLATE


def test_rows_in_another_order_are_a_difference(saved):
    """Verify knows the order by a formula of its own."""
    folder, _ = saved["falcon"]  # not interleaved
    checkpoint = open_checkpoint(folder)
    name = "backbone.layers.0.attention.q_proj.weight"
    object.__setattr__(checkpoint.config.tensors[name], "rotated", 4)
    difference = verify_gguf(checkpoint, open_gguf(folder.with_suffix(".gguf"))).difference
    assert difference.tensor == "blk.0.attn_q.weight"


def test_the_keys_of_a_hybrid(saved):
    """As the converter's GraniteHybridModel writes them (conversion/granite.py)."""
    folder, _ = saved["granite"]
    fields = gguf.GGUFReader(folder.with_suffix(".gguf")).fields
    wanted = {
        "attention.head_count_kv": [0, 0, 2, 0], "attention.head_count": 8, "attention.scale": 0.0625, "embedding_scale": 12.0,
        "residual_scale": float(np.float32(0.246)), "logit_scale": 6.0, "rope.scaling.finetuned": False, "block_count": 4,
        "feed_forward_length": 512, "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 64, "ssm.group_count": 1,
        "ssm.time_step_rank": 8, "rope.dimension_count": 32,
    }  # fmt: skip
    assert {key: fields[f"granitehybrid.{key}"].contents() for key in wanted} == wanted
    assert fields["general.architecture"].contents() == "granitehybrid"


def permuted(weight, heads):
    """The converter's LlamaModel.permute, element by element: (head, half, i) goes to (head, i, half)."""
    width = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for half in range(2):
            for i in range(width // 2):
                out[head * width + 2 * i + half] = weight[head * width + half * (width // 2) + i]
    return out


def test_q_and_k_are_permuted_and_gate_and_up_taken_apart(saved):
    folder, theirs = saved["granite"]
    state = theirs.state_dict()
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder.with_suffix(".gguf")).tensors}
    layer = "model.layers.2."
    fused = state[layer + "shared_mlp.input_linear.weight"].numpy()
    wanted = {
        "attn_q.weight": permuted(state[layer + "self_attn.q_proj.weight"].numpy(), 8),
        "attn_k.weight": permuted(state[layer + "self_attn.k_proj.weight"].numpy(), 2),
        "attn_v.weight": state[layer + "self_attn.v_proj.weight"].numpy(),
        "ffn_gate.weight": fused[:512],
        "ffn_up.weight": fused[512:],
        "ffn_down.weight": state[layer + "shared_mlp.output_linear.weight"].numpy(),
    }
    for name, values in wanted.items():
        assert np.array_equal(tensors[f"blk.2.{name}"], values.astype(np.float16)), name
    assert np.array_equal(tensors["blk.2.ffn_norm.weight"], state[layer + "post_attention_layernorm.weight"].numpy())


def test_falcons_multipliers_are_folded(saved):
    folder, theirs = saved["falcon"]
    state = theirs.state_dict()
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(folder.with_suffix(".gguf")).tensors}
    in_proj = state["model.layers.1.mamba.in_proj.weight"] * 1.25
    for rows, factor in zip(in_proj.split([384, 384, 64, 64, 6]), (0.35, 0.25, 0.18, 0.5, 0.32), strict=True):
        rows *= factor
    k = state["model.layers.1.self_attn.k_proj.weight"] * 0.39 * 0.75
    wanted = {"blk.1.ssm_in.weight": in_proj, "blk.1.attn_k.weight": k, "output.weight": state["lm_head.weight"] * 0.39}
    for name, values in wanted.items():
        assert np.array_equal(tensors[name], values.numpy().astype(np.float16)), name
    assert "blk.1.ffn_norm" in tensors  # without a suffix: what llama.cpp's loader asks for


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_of_llamacpp_are_transformers(saved, name):
    folder, theirs = saved[name]
    llama = Llama(folder.with_suffix(".gguf"))
    for prompt in PROMPTS:
        tokens = llama.tokenize(prompt)
        found = llama.greedy(tokens, 64)
        whole = torch.tensor([tokens + [token for token, _ in found]])
        with torch.no_grad():
            logits = torch.log_softmax(theirs(whole, use_cache=False).logits[0, len(tokens) - 1 : -1], -1)
        for row, (token, log_probability) in zip(logits, found, strict=True):
            assert abs(float(row[token]) - log_probability) < 0.02  # llama.cpp's activations and cache are fp16
            assert float(row.max() - row[token]) < 0.02


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama", "granite", "falcon"])
def test_a_ternary_file_computes_in_llamacpp_what_torch_computes(saved, name, tmp_path):
    """Rows of 320 in groups of 64 in Q2_0, the others in TQ1_0; llama.cpp rounds what enters a product to int8."""
    make("rtn", saved[name][0], tmp_path / "ternary")
    checkpoint = open_checkpoint(tmp_path / "ternary")
    plan = plan_export(checkpoint)
    plan.write(tmp_path / "m.gguf", lambda tensor: None)
    assert verify_gguf(checkpoint, open_gguf(tmp_path / "m.gguf")).difference is None
    llama, ours = Llama(tmp_path / "m.gguf"), load_model(tmp_path / "ternary")
    tokens = llama.tokenize(PROMPTS[0])
    for token, log_probability in llama.greedy(tokens, 8):
        with torch.no_grad():
            logits = torch.log_softmax(ours(torch.tensor([tokens]))[0, -1], -1)
        assert abs(float(logits[token]) - log_probability) < 0.15
        assert float(logits.max() - logits[token]) < 0.3
        tokens = [*tokens, token]


def test_auto_chooses_tensor_by_tensor_and_says_why(saved, tmp_path):
    make("rtn", saved["falcon"][0], tmp_path)
    plan = plan_export(open_checkpoint(tmp_path))
    types = {tensor.name: tensor.kind.name for tensor in plan.tensors}
    # rows of d_model 256, d_inner 384, d_ff 320 and 4 heads of 32
    assert [types[f"blk.0.{name}.weight"] for name in ("attn_q", "ssm_out", "ffn_down", "attn_output")] == [
        "TQ1_0",
        "Q2_0",
        "Q2_0",
        "Q2_0",
    ]
    assert "down_proj is Q2_0: rows of 320 in groups of 64 have no smaller type" in plan.reasons
    assert plan.metadata["tmexport.group_size"] == 64
    assert plan.metadata["tmexport.group_size.ssm_out.weight"] == 128
    assert "tmexport.group_size.ffn_down.weight" not in plan.metadata


def test_the_config_that_a_file_says_makes_the_same_config_json(saved):
    for folder, _ in saved.values():
        config = open_checkpoint(folder).config.to_hf()
        again = config_from_metadata(open_gguf(folder.with_suffix(".gguf"))).to_hf()
        differing = {key for key in config if config[key] != again.get(key)}
        assert differing <= {"mamba_chunk_size"}, (folder, differing)
        json.dumps(again)
