"""transformers loads our checkpoints, and computes what qat computes."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import tmexport.hf
from qat.model import load_model
from tests.commands import invoke
from tests.models import SMALL, coded_tensors, train_tokenizer, write_small
from tests.tmexport.families import save
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli import cli
from tmexport.errors import UsageError
from tmexport.model import mamba1_model, mamba2_model

IDS = torch.tensor([[1, 2, 300, 4, 5, 9, 100, 7, 7, 8], [400, 3, 3, 2, 1, 0, 11, 12, 13, 14]])


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check(folder, tmp_path):
    """Logits are qat's; the weights are the codes multiplied out, to the bit; what is saved loads without us."""
    theirs, ours = loaded(folder), load_model(folder).eval()
    with torch.no_grad():
        got, wanted = theirs(IDS).logits, ours(IDS)
    assert (got - wanted).abs().max() < 1e-4
    assert wanted.std() > 0.05
    checkpoint = open_checkpoint(folder)
    weights = theirs.state_dict()
    for name, tensor in checkpoint.config.tensors.items():
        if checkpoint.form(name) is not None and tensor.part[1] == 1:
            assert np.array_equal(weights[tensor.file].numpy(), checkpoint.dense(name)), name
    theirs.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "dense")(IDS).logits, got)


@pytest.mark.parametrize("group_size", [64, 256])
@pytest.mark.parametrize("tied", [True, False])
def test_ternary_mamba2(tmp_path, group_size, tied):
    config = mamba2_model(d_model=256, n_layer=2, vocab_size=512, d_state=64, n_groups=2, tie_embeddings=tied)
    check(write_small(tmp_path / "m", config, group_size), tmp_path)


@pytest.mark.parametrize(
    ("config", "projections", "embedding"),
    [
        (SMALL, "binary", "int8"),
        (mamba2_model(d_model=256, n_layer=2, vocab_size=512, d_state=64, tie_embeddings=True), "int4", "int8"),
        (SMALL, {"in_proj": "ternary"}, "ternary"),
        (mamba1_model(d_model=256, n_layer=2, vocab_size=512), "ternary", "dense"),
    ],
    ids=["binary-int8", "int4-tied-int8", "one-role", "mamba1"],
)
def test_other_kinds_and_roles(tmp_path, config, projections, embedding):
    write_checkpoint(tmp_path / "m", config, coded_tensors(config, projections, embedding))
    check(tmp_path / "m", tmp_path)


@pytest.mark.parametrize("name", ["llama", "granite", "falcon"])
def test_models_with_attention(tmp_path, name):
    save(name, tmp_path / "teacher")
    train_tokenizer(tmp_path / "teacher" / "tokenizer.json")
    result = invoke(cli, "ptq", "rtn", "--teacher", tmp_path / "teacher", "--out", tmp_path / "m")
    assert result.exit_code == 0, result.stderr
    check(tmp_path / "m", tmp_path)


def test_without_the_import_transformers_does_not_read_codes_as_weights(tmp_path):
    """The folder is not silently a model of random weights for those who forget the import: the weights are missing."""
    folder = write_small(tmp_path / "m", SMALL, 64)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A;"
        f"m, info = A.from_pretrained({str(folder)!r}, output_loading_info=True); print(len(info['missing_keys']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode or int(done.stdout.split()[-1]) == 4
    assert "ternary" in done.stderr


def test_a_release_that_would_load_other_weights_is_refused(monkeypatch):
    """transformers 5.22 takes the same classes and loads random weights where head and embedding are one."""
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.22.2")
    with pytest.raises(
        UsageError, match=r"needs torch and transformers 5\.24 or newer; this is 5\.22\.2; run: pip install"
    ):
        importlib.reload(tmexport.hf)


def test_a_damaged_scale_is_an_error(tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = write_small(tmp_path / "m", SMALL, 64)
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.0.mixer.in_proj.weight.scales"][3, 1] = np.inf
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=r"in_proj|conversion"):
        loaded(folder)


def test_registration_is_ours_alone():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert [AUTO_QUANTIZER_MAPPING[m] for m in tmexport.hf.METHODS] == [tmexport.hf.Quantizer] * 2
