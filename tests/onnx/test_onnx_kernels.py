"""The custom form with runtime_ref's arithmetic: the same bits as runtime_ref on the GGUF of the same checkpoint."""

import hashlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime_ref.gguf_source import gguf_source
from runtime_ref.model import Model
from runtime_ref.ort import OrtModel
from runtime_ref.reference import ReferenceModel
from runtime_ref.weights import load_weights
from tests.onnx.exporting import export, token_ids
from tmexport.errors import UsageError
from tmexport.gguf.export import plan_export

IDS = 40  # more than the rows the kernels take at a time


def gguf_of(checkpoint, path, embedding):
    plan_export(checkpoint, "auto", embedding).write(path, lambda tensor: None)
    return path


def digest(logits):
    assert logits.dtype == np.float32
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


@pytest.mark.parametrize(("embedding", "gguf_embedding"), [("q8", "q8_0"), ("f16", "f16")])
@pytest.mark.parametrize("source", ["tied", "untied", "groups"])
def test_logits_equal_runtime_ref_exact(request, tmp_path, source, embedding, gguf_embedding):
    checkpoint = request.getfixturevalue(source)
    ids = token_ids(checkpoint.config, IDS)
    runtime = Model.load(gguf_of(checkpoint, tmp_path / "m.gguf", gguf_embedding), "exact", threads=1)
    want = np.concatenate(list(runtime.score(runtime.new_state(), ids)))
    model = OrtModel.load(export(checkpoint, tmp_path / "m.onnx", "custom", embedding), threads=1, kernels=True)
    assert digest(model.run(model.new_state(), ids[None])[0]) == digest(want)


def test_logits_equal_the_specification(tied, files, tmp_path):
    """The numpy specification, token by token: another road to the same bits than the compiled runtime."""
    ids = token_ids(tied.config, 8)
    reference = ReferenceModel(load_weights(gguf_source(gguf_of(tied, tmp_path / "m.gguf", "q8_0"))), "exact")
    state = reference.new_state()
    want = np.stack([reference.step(state, int(token)) for token in ids])
    model = OrtModel.load(files["custom", "q8"], threads=1, kernels=True)
    ours = model.new_state()
    assert digest(model.run(ours, ids[None])[0]) == digest(want)
    arrays = ours.arrays()
    for i in range(tied.config.n_layer):
        assert np.array_equal(arrays[f"past_ssm.{i}"][0].swapaxes(1, 2), state.branches[i]["ssm"])
        assert np.array_equal(arrays[f"past_conv.{i}"][0].T, state.branches[i]["conv"])


@pytest.fixture
def through_python(monkeypatch):
    """As on a system that loads no library from memory."""
    from runtime_ref.ort import shim

    monkeypatch.setattr(shim, "supported", lambda: False)


@pytest.mark.parametrize("source", ["tied", "groups"])
def test_python_operators_give_the_same_bits(request, tmp_path, source, through_python):
    checkpoint = request.getfixturevalue(source)
    ids = token_ids(checkpoint.config, IDS)
    runtime = Model.load(gguf_of(checkpoint, tmp_path / "m.gguf", "q8_0"), "exact", threads=1)
    want = np.concatenate(list(runtime.score(runtime.new_state(), ids)))
    model = OrtModel.load(export(checkpoint, tmp_path / "m.onnx", "custom", "q8"), threads=1, kernels=True)
    assert digest(model.run(model.new_state(), ids[None])[0]) == digest(want)


@pytest.fixture(scope="module")
def exact(files):
    model = OrtModel.load(files["custom", "q8"], threads=1, kernels=True)
    ids = token_ids(model.config, 2, IDS)
    return model, ids, digest(model.run(model.new_state(2), ids))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, IDS - 1), unique=True, max_size=6).map(sorted))
def test_any_split_gives_the_same_bits(exact, cuts):
    model, ids, want = exact
    state = model.new_state(2)
    parts = [model.run(state, ids[:, a:b]) for a, b in zip((0, *cuts), (*cuts, IDS), strict=True)]
    assert digest(np.concatenate(parts, axis=1)) == want


def test_weights_that_begin_alike_are_told_apart():
    """The library copies weights for every call, so they are known by content: here two that differ in the last byte."""
    from runtime_ref.arithmetic import Int16
    from runtime_ref.ort.custom_ops import ternary_matmul
    from runtime_ref.reference import integer_matmul, quantize

    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 1, 256)).astype(np.float32)
    scales = np.full((20, 4), 0.5, np.float32)
    codes = np.full((20, 64), 0b01_01_01_10, np.uint8)
    other = codes.copy()
    other[-1, -1] = 0b00_01_01_10
    found = [ternary_matmul(x, c.copy(), scales.copy(), 64, "exact")[0, 0] for c in (codes, other, codes)]
    for packed, y in zip((codes, other, codes), found, strict=True):
        plain = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(20, 256).astype(np.int8) - 1
        assert np.array_equal(y, integer_matmul(plain, scales, *quantize(x.reshape(-1), 64, Int16().levels)))
    assert found[0][-1] != found[1][-1]


def test_what_the_kernels_cannot_compute_is_one_clear_error():
    from runtime_ref.ort.custom_ops import q8_matmul, rms_norm, ternary_matmul
    from tmexport.errors import GGUFError

    x, codes, scales = np.ones((1, 1, 64), np.float32), np.zeros((8, 16), np.uint8), np.ones((8, 1), np.float32)
    with pytest.raises(UsageError, match="a scale that fp16 does not hold"):
        ternary_matmul(x, codes, scales * np.float32(0.1), 64, "exact")
    with pytest.raises(GGUFError, match="a ternary weight"):
        ternary_matmul(x, codes | 3, scales, 64, "exact")
    with pytest.raises(UsageError, match="rows of 60 and 1 scales; expected groups of whole 64s"):
        ternary_matmul(x[..., :60], codes[:, :15], scales, 60, "exact")
    with pytest.raises(UsageError, match="rows of 64 and 1 scales; expected one for every 32"):
        q8_matmul(x, np.zeros((8, 64), np.int8), scales, "exact")
    with pytest.raises(UsageError, match="need a multiple of 16"):
        rms_norm(x[..., :20], np.ones(20, np.float32), np.float32(1e-5), "exact")


@pytest.mark.parametrize("native", [True, False])
def test_another_profile_is_refused(request, files, tmp_path, native):
    import onnx

    if not native:
        request.getfixturevalue("through_python")

    model = onnx.load(files["custom", "q8"])
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "profile":
                attribute.s = b"fast"
    onnx.save(model, tmp_path / "m.onnx")

    def use():  # at load, or at the first run
        broken = OrtModel.load(tmp_path / "m.onnx", threads=1, kernels=True)
        broken.decode(broken.new_state(), 1)

    with pytest.raises(UsageError, match="profile 'fast'; these kernels compute 'exact'"):
        use()


def test_ctrl_c_inside_an_operator_reaches_the_caller(files, monkeypatch, through_python):
    from runtime_ref.ort import custom_ops as kernels

    def interrupted(*args):
        raise KeyboardInterrupt

    model = OrtModel.load(files["custom", "q8"], threads=1, kernels=True)
    monkeypatch.setattr(kernels, "_check_profile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.decode(model.new_state(), 1)
    monkeypatch.undo()
    assert np.isfinite(model.decode(model.new_state(), 1)).all()


def test_without_kernels_the_functions_run(files, exact):
    model, ids, _ = exact
    plain = OrtModel.load(files["custom", "q8"], threads=1)
    found, want = plain.run(plain.new_state(2), ids), model.run(model.new_state(2), ids)
    assert 0 < np.abs(found - want).max() < 1e-3 * (want.max() - want.min())
