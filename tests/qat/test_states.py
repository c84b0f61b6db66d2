"""A state rounded at every token: the torch model's equals the runtime's, row by row and in the logits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qat.model import load_model
from qat.model.states import ADVANCE, Rows, keep_states
from runtime_ref.arithmetic import Fp16, Fp32, Int8Rows, Row
from runtime_ref.gguf_source import gguf_source
from runtime_ref.reference import ReferenceModel
from runtime_ref.weights import load_weights
from tests.models import random_tensors
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.gguf.export import plan_export
from tmexport.model import Block, mamba2_model
from tmexport.model.branches.mamba1 import Mamba1

CONFIG = mamba2_model(d_model=64, n_layer=2, vocab_size=96, d_state=32, headdim=32, n_groups=2)
MAMBA1 = Mamba1(d_model=64, d_inner=128, dt_rank=4)
FORMATS = {"fp32": Fp32(), "fp16": Fp16(), "int8": Int8Rows()}


def numbers(seed, position):
    rng = np.random.default_rng(seed)
    decay = rng.uniform(0.2, 1.0, (6, 16)).astype(np.float32)
    step, b = (rng.standard_normal(n).astype(np.float32) * 10 ** rng.uniform(-2, 2) for n in (6, 16))
    if seed % 5 == 4:
        step[:3], b[:] = 0, 0
    return Row(decay, decay.max(-1), step, b[None], position)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_runtimes_bit_for_bit(name):
    kept_as = FORMATS[name]
    stored = [np.zeros(array.shape, array.dtype) for array in kept_as.arrays("h", (6, 16))]
    rows = Rows(torch.zeros(6, 16), torch.zeros(6) if name == "int8" else torch.ones(6))
    for position in range(40):
        row = numbers(position, position)
        read, unit = kept_as.advance(stored, row)
        found = ADVANCE[name](rows, *(torch.from_numpy(v) for v in row[:4]))
        rows.position += 1
        assert found.numpy().tobytes() == read.tobytes()
        assert np.array_equal(rows.codes.numpy(), stored[0].astype(np.float32))
        assert np.array_equal(rows.unit.numpy(), unit)


def test_what_is_kept_in_8_bits_by_hand():
    """Powers of two: nothing is rounded but the codes, and the bound is the value itself."""
    stored = [np.zeros((1, 16), np.int8), np.zeros(1, np.float32)]
    b = np.zeros((1, 16), np.float32)
    b[0, :3] = 1.0, 0.5, -0.25
    one = np.ones((1, 1), np.float32)
    read, unit = Int8Rows().advance(stored, Row(one, one[0], np.float32([4.0]), b, 0))
    assert unit == np.float32(4 / 127)
    assert list(stored[0][0, :3]) == [127, 64, -32]  # 63.5 and -31.75, halves to even
    assert (read * unit)[0, :3] == pytest.approx([4.0, 2.0, -1.0], rel=1e-6)
    # three tokens that add nothing halve it: the bound fades with it, and the codes stay
    for position in range(1, 4):
        Int8Rows().advance(stored, Row(one / 2, one[0] / 2, np.float32([0.0]), b, position))
    assert list(stored[0][0, :3]) == [127, 64, -32]
    assert stored[1] == np.float32(0.5 / 127)
    # one that takes all of it away leaves a loose bound, until the codes are looked at
    for position in (4, 8):
        Int8Rows().advance(
            stored, Row(one, one[0], np.float32([-0.5]) if position == 4 else np.float32([0.0]), b, position)
        )
    assert abs(stored[0]).max() * stored[1] <= 0.01


@pytest.fixture(scope="module", params=["mamba2", "mamba1"])
def pair(request, tmp_path_factory):
    """A model in torch, and the folder of its GGUF in F16: every matrix is the same, products are not rounded."""
    folder = tmp_path_factory.mktemp(request.param)
    config = CONFIG
    if request.param == "mamba1":
        config = replace(CONFIG, family="mamba", blocks=(Block((MAMBA1,)),) * 2)
    tensors = {
        name: value.astype(np.float16).astype(np.float32) if value.ndim == 2 and "A_log" not in name else value
        for name, value in random_tensors(config).items()
    }
    write_checkpoint(folder / "c", config, tensors)
    plan_export(open_checkpoint(folder / "c"), "f16", "f16").write(folder / "m.gguf", lambda t: None)
    return folder


@pytest.mark.parametrize(("name", "profile"), [("fp32", "exact"), ("fp16", "fast"), ("int8", "compact")])
def test_the_models_logits_are_the_runtimes(pair, name, profile):
    ids = [(37 * i + 11) % CONFIG.vocab_size for i in range(48)]
    reference = ReferenceModel(load_weights(gguf_source(pair / "m.gguf")), profile)
    state = reference.new_state()
    wanted = np.stack([reference.step(state, token) for token in ids])
    model = load_model(pair / "c").requires_grad_(False)
    plain = model(torch.tensor([ids]))[0].numpy()
    keep_states(model, name)
    found = model(torch.tensor([ids]))[0].numpy()
    rounding, difference = (np.abs(wanted - logits).mean() for logits in (plain, found))
    assert difference < 2e-6 if name == "fp32" else difference < 0.1 * rounding
