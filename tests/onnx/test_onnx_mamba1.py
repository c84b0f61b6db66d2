"""Mamba-1 in every form: valid, the numbers of transformers, the same in parts, and proven equal to its checkpoint."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from tests.models import coded_tensors, train_tokenizer
from tests.onnx.exporting import FORMS, export
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.model import mamba1_model
from tmexport.onnx.verify import verify_onnx

CONFIG = mamba1_model(256, 2, 512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamba1") / "ckpt"
    folder.mkdir()
    write_checkpoint(folder, CONFIG, coded_tensors(CONFIG, "ternary"), train_tokenizer(folder / "tokenizer.json"))
    return open_checkpoint(folder)


def peer_logits(checkpoint, ids):
    """transformers' MambaForCausalLM with the dequantised weights."""
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**CONFIG.to_hf())).eval()
    state = {name: torch.from_numpy(checkpoint.dense(name)) for name in checkpoint.names}
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    model.tie_weights()
    with torch.no_grad():
        return model(torch.from_numpy(ids), use_cache=False).logits.numpy()


def zero_state(batch):
    state = {}
    for i in range(CONFIG.n_layer):
        state[f"past_conv.{i}"] = np.zeros((batch, 512, 3), np.float32)
        state[f"past_ssm.{i}"] = np.zeros((batch, 16, 512), np.float32)
    return state


def run(session, ids, state):
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"input_ids": ids, **state}), strict=True))
    return found["logits"], {n.replace("present", "past"): v for n, v in found.items() if n != "logits"}


@pytest.mark.parametrize("form", FORMS)
def test_numbers_parts_and_proof(checkpoint, tmp_path, form):
    path = export(checkpoint, tmp_path / "m.onnx", form, "f32")
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(1).integers(0, 512, (2, 30))
    wanted = peer_logits(checkpoint, ids)
    whole, _ = run(session, ids, zero_state(2))
    limit = 0.03 * np.ptp(wanted) if form == "ort" else 1e-4  # ort rounds activations to 8 bits
    assert np.abs(whole - wanted).max() < limit
    state, parts = zero_state(2), []
    for part in np.split(ids, (11, 12), axis=1):
        logits, state = run(session, part, state)
        parts.append(logits)
    assert np.abs(np.concatenate(parts, 1) - whole).max() < (limit if form == "ort" else 5e-5)
    report = verify_onnx(checkpoint, path)
    assert (report.difference, report.ternary_tensors) == (None, 4)
