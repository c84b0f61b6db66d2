"""A Hadamard matrix before out_proj at run time: one function in torch, in the runtime and in ONNX; stock programs refuse the files."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from scipy.linalg import hadamard as sylvester

from qat.model import load_model
from qat.model.mamba2 import Hadamard
from qat.ptq.making import make
from qat.ptq.transforms import Work, apply
from runtime_ref.arithmetic import PRESETS
from runtime_ref.model import Model
from runtime_ref.reference.functions import hadamard
from runtime_ref.weights import memory_source
from tests.commands import invoke
from tests.llama import Llama
from tests.models import mixer, random_tensors, train_tokenizer
from tests.onnx.exporting import export, feed, share_of_spread
from tests.runtime_ref.small import CONFIG, TOKENS, all_logits, reference_logits, tensors
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli import cli
from tmexport.doctor import diagnose
from tmexport.errors import ConfigError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import config_from_metadata
from tmexport.gguf.reader import open_gguf
from tmexport.model import Block, mamba2_model, parse_config

SHAPE = mamba2_model(256, 2, 512, d_state=64, n_groups=2)
IDS = np.random.default_rng(1).integers(0, 512, (2, 70))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher and what `ptq rtn --transform online` makes of it."""
    folder = tmp_path_factory.mktemp("online")
    write_checkpoint(folder / "teacher", SHAPE, random_tensors(SHAPE, 3), train_tokenizer(folder / "tokenizer.json"))
    make("rtn", folder / "teacher", folder / "made", "int8", embedding="int8", transforms=["online"])
    plan_export(open_checkpoint(folder / "made")).write(folder / "made.gguf", lambda tensor: None)
    return folder


@pytest.mark.parametrize("size", [2, 16, 64, 512])
def test_the_butterfly_is_the_matrix_and_torchs_bits_are_the_specifications(size):
    x = np.random.default_rng(size).standard_normal(1536).astype(np.float32)
    wanted = x.astype(np.float64).reshape(-1, size) @ sylvester(size) / np.sqrt(size)
    found = hadamard(x, size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.ravel(), rtol=0, atol=2e-6)
    assert Hadamard(size)(torch.from_numpy(x)).numpy().tobytes() == found.tobytes()


@pytest.mark.parametrize("profile", PRESETS)
def test_the_kernels_bits_are_the_specifications(profile):
    own = mixer(CONFIG)
    turned = [replace(own, online_hadamard=512), replace(own, d_inner=256, headdim=32, n_groups=1, online_hadamard=16)]
    config = replace(CONFIG, blocks=tuple(Block((branch,)) for branch in (*turned, own)))
    src = memory_source(config, tensors(config, "ternary64"))
    wanted = reference_logits(src, profile, TOKENS)
    model = Model(src, profile, threads=2)
    assert all_logits(model, TOKENS).tobytes() == wanted.tobytes()
    state = model.new_state()
    model.prefill(state, TOKENS[:4])
    for token in TOKENS[4:-1]:
        model.decode(state, token)
    assert model.decode_batch([state, state.copy()], [TOKENS[-1]] * 2).tobytes() == wanted[[-1, -1]].tobytes()


def test_the_checkpoint_and_the_file_say_so_and_hold_the_same(made):
    checkpoint, gguf = open_checkpoint(made / "made"), open_gguf(made / "made.gguf")
    assert checkpoint.config.family == gguf.metadata["general.architecture"] == "tmexport-mamba2"
    assert mixer(checkpoint.config).online_hadamard == gguf.metadata["tmexport-mamba2.ssm.online_hadamard"] == 512
    assert config_from_metadata(gguf).blocks == checkpoint.config.blocks
    raw = json.loads((made / "made" / "config.json").read_text())
    assert raw["online_hadamard"] == 512
    assert [step["name"] for step in raw["quantization_config"]["provenance"]["transforms"]] == ["online"]
    done = invoke(cli, "verify", made / "made", made / "made.gguf")
    assert done.exit_code == 0, done.stderr


def test_stock_programs_refuse_it(made):
    with pytest.raises(RuntimeError):
        Llama(made / "made.gguf")
    with pytest.raises(ValueError, match="tmexport-mamba2"):
        transformers.AutoConfig.from_pretrained(made / "made")
    assert diagnose(made / "made.gguf").loads == ["tmexport, runtime_ref"]
    assert invoke(cli, "card", made / "made").exit_code == 0
    card = (made / "made" / "README.md").read_text()
    assert "Stock programs (transformers, llama.cpp) do not compute this architecture" in card
    assert "from_pretrained" not in card


def test_torch_the_runtime_and_onnx_agree(made, tmp_path):
    checkpoint = open_checkpoint(made / "made")
    with torch.no_grad():
        wanted = load_model(made / "made")(torch.from_numpy(IDS)).numpy()
        plain = load_model(made / "teacher")(torch.from_numpy(IDS)).numpy()
    assert 1e-4 < share_of_spread(wanted, plain) < 0.02  # rounded to int8
    model = Model.load(made / "made.gguf", "exact", 1)
    assert share_of_spread(all_logits(model, IDS[0].tolist()), wanted[0]) < 1e-4  # int16 activations
    model.close()
    for form, most in (("portable", 1e-5), ("ort", 0.02)):
        path = export(checkpoint, tmp_path / f"{form}.onnx", form, "q8")
        assert share_of_spread(feed(onnxruntime.InferenceSession(path), checkpoint.config, IDS), wanted) < most
        done = invoke(cli, "verify", made / "made", path)
        assert done.exit_code == 0, done.stderr
    done = invoke(cli, "onnx", made / "made", tmp_path / "custom.onnx", "--ops", "custom")
    assert done.exit_code == 2
    assert "--ops custom has no operator for the online Hadamard matrix" in done.stderr
    assert not (tmp_path / "custom.onnx").exists()


def test_what_cannot_be_is_refused(made):
    work = Work.of(open_checkpoint(made / "teacher"))
    apply(work, ["online"], None, 0)
    ids = torch.from_numpy(IDS)
    with pytest.raises(UsageError, match="put sort before online"):
        apply(work, ["sort"], ids, 0)
    with pytest.raises(UsageError, match="the model is a tmexport-mamba2; expected a pure Mamba-2"):
        apply(work, ["online"], None, 0)
    raw = work.config.to_hf()
    for wrong in (3, 48, 1024, "512", -2, True, None):
        with pytest.raises(ConfigError, match="online_hadamard"):
            parse_config(raw | {"online_hadamard": wrong})
    with pytest.raises(ConfigError, match="online_hadamard is missing"):
        parse_config({key: value for key, value in raw.items() if key != "online_hadamard"})
