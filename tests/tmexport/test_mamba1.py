"""Mamba-1: read from both dialects, trained in torch as transformers computes it, exported as llama.cpp's own converter would."""

import json
import math

import gguf
import numpy as np
import pytest
import torch
import transformers

from qat.model import load_model
from runtime_ref.memory import need
from runtime_ref.model import Model
from tests.llama import Llama
from tests.models import coded_tensors, random_tensors, train_tokenizer
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import ConfigError
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import config_from_metadata
from tmexport.gguf.reader import open_gguf
from tmexport.model import load_config, mamba1_model, parse_config
from tmexport.types import GGMLType, decode_values
from tmexport.verify import verify_gguf

SMALL1 = mamba1_model(256, 2, 512)
# state-spaces/mamba-130m's config.json, as published
PUBLISHED_130M = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip


def theirs(folder):
    return transformers.MambaForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamba1")
    write_checkpoint(folder / "dense", SMALL1, random_tensors(SMALL1), train_tokenizer(folder / "tokenizer.json"))
    write_checkpoint(folder / "ckpt", SMALL1, coded_tensors(SMALL1, "ternary"), folder / "tokenizer.json")
    return folder


def test_the_published_130m_config():
    model = parse_config(PUBLISHED_130M)
    assert model == mamba1_model(768, 24, 50280, d_state=16, dt_rank=48)
    # the parameters of the published checkpoint, counted by its authors: 129.1 M
    assert round(sum(math.prod(t.shape) for t in model.tensors.values()) / 1e6, 1) == 129.1


def test_transformers_reads_the_config_we_write_the_same_way(tmp_path):
    model = mamba1_model(128, 3, 640, d_state=8, dt_rank=10, rms_eps=1e-6, tie_embeddings=False, eos_token_id=0)
    transformers.MambaConfig(**model.to_hf()).save_pretrained(tmp_path)
    assert load_config(tmp_path)[0] == model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_bias": True}, "use_bias is True"),
        ({"expand": 3, "intermediate_size": 768}, "expand is 3; only 2"),
        ({"intermediate_size": 100}, "intermediate_size is 100, but expand \\* hidden_size is 512"),
        ({"time_step_rank": 0}, "dt_rank is 0"),
    ],
)
def test_what_cannot_be_represented_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(SMALL1.to_hf() | change)


def test_torch_computes_what_transformers_computes(small):
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (2, 40)))
    ours, peer = load_model(small / "dense"), theirs(small / "dense")
    with torch.no_grad():
        wanted, found = peer(ids, use_cache=False).logits, ours(ids)
        assert (found - wanted).abs().max() < 1e-4
        states = ours.fresh_states()
        parts = torch.cat([ours(part, states) for part in ids.split((13, 1, 26), 1)], 1)
        assert (parts - wanted).abs().max() < 1e-4


def test_an_f16_file_is_what_llamacpps_converter_writes(small, tmp_path):
    """Its rules (conversion/mamba.py and base.py): matrices F16, everything else F32, A = -exp(A_log), conv1d squeezed."""
    path = tmp_path / "f16.gguf"
    plan_export(open_checkpoint(small / "dense"), "f16").write(path, lambda tensor: None)
    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    source = random_tensors(SMALL1)
    f16 = {"ssm_in", "ssm_x", "ssm_dt", "ssm_out", "token_embd"}
    names = {
        "in_proj.weight": "ssm_in.weight", "conv1d.weight": "ssm_conv1d.weight", "conv1d.bias": "ssm_conv1d.bias",
        "x_proj.weight": "ssm_x.weight", "dt_proj.weight": "ssm_dt.weight", "dt_proj.bias": "ssm_dt.bias", "A_log": "ssm_a",
        "D": "ssm_d", "out_proj.weight": "ssm_out.weight",
    }  # fmt: skip
    wanted = {
        "token_embd.weight": source["backbone.embeddings.weight"],
        "output_norm.weight": source["backbone.norm_f.weight"],
    }
    for i in range(2):
        wanted[f"blk.{i}.attn_norm.weight"] = source[f"backbone.layers.{i}.norm.weight"]
        for hf, name in names.items():
            values = source[f"backbone.layers.{i}.mixer.{hf}"]
            wanted[f"blk.{i}.{name}"] = -np.exp(values.astype(np.float64)) if hf == "A_log" else values.squeeze()
    assert set(by_name) == set(wanted)
    for name, values in wanted.items():
        half = name.endswith(".weight") and (name.split(".")[-2] in f16)
        tensor = by_name[name]
        assert tensor.tensor_type.name == ("F16" if half else "F32"), name
        assert tuple(tensor.shape[::-1]) == values.shape
        assert np.array_equal(tensor.data.reshape(values.shape), values.astype(np.float16 if half else np.float32)), (
            name
        )


def test_ternary_is_exact_and_the_dimensions_come_back(small):
    checkpoint = open_checkpoint(small / "ckpt")
    assert json.loads((small / "ckpt" / "config.json").read_text())["quantization_config"]["version"] == 1
    plan = plan_export(checkpoint)
    path = small / "ternary.gguf"
    plan.write(path, lambda tensor: None)
    file = open_gguf(path)
    assert file.tensors["blk.0.ssm_in.weight"].type is GGMLType.TQ1_0
    model = config_from_metadata(file)
    assert (model.blocks, model.family) == (SMALL1.blocks, "mamba")
    report = verify_gguf(checkpoint, file)
    assert (report.difference, report.ternary_tensors) == (None, 4)
    info = file.tensors["blk.1.ssm_in.weight"]
    wanted = checkpoint.codes("backbone.layers.1.mixer.in_proj.weight").dense()
    assert np.array_equal(decode_values(file.blocks(info.name), info.type, 256), wanted)


def test_greedy_tokens_of_llamacpp_are_transformers(small, tmp_path):
    path = tmp_path / "f16.gguf"
    plan_export(open_checkpoint(small / "dense"), "f16").write(path, lambda tensor: None)
    llama, peer = Llama(path), theirs(small / "dense")
    tokens = llama.tokenize("Fellow citizens of the Senate")
    for _ in range(16):
        with torch.no_grad():
            logits = torch.log_softmax(peer(torch.tensor([tokens]), use_cache=False).logits[0, -1], -1)
        token, log_probability = llama.next_token(tokens)
        assert abs(float(logits[token]) - log_probability) < 0.01  # llama.cpp's activations are fp16
        assert float(logits.max() - logits[token]) < 0.02
        tokens = [*tokens, token]


def test_the_runtime_gives_transformers_logits(small, tmp_path):
    """Matrices in fp16, which the peer gets too; activations as they are."""
    path = tmp_path / "f16.gguf"
    plan_export(open_checkpoint(small / "dense"), "f16", "f16").write(path, lambda tensor: None)
    peer = theirs(small / "dense")
    for name, weight in peer.named_parameters():
        if weight.ndim == 2 and not name.endswith("A_log"):
            weight.data = weight.data.half().float()
    tokens = list(range(3, 40))
    with torch.no_grad():
        wanted = peer(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    model = Model.load(path, "exact", 1)
    found = np.concatenate(list(model.score(model.new_state(), tokens)))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0"])
def test_the_runtime_follows_llamacpp(small, tmp_path, kind):
    path = tmp_path / "m.gguf"
    plan_export(open_checkpoint(small / "ckpt"), kind, "q8_0").write(path, lambda tensor: None)
    llama, model = Llama(path), Model.load(path, "fast", 1)
    prompt = llama.tokenize("Fellow citizens of the Senate")
    state = model.new_state()
    logits = model.prefill(state, prompt)
    for token, log_probability in llama.greedy(prompt, 32):
        chances = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
        assert abs(chances[token] - log_probability) < 0.02
        assert chances.max() - chances[token] < 0.02
        logits = model.decode(state, token)
    own = need(open_gguf(path), "fast")
    assert own.weights == model.weight_bytes
    assert own.states == state.nbytes
