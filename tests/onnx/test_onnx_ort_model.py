"""OrtModel: the state stays in its buffers, and bad input is refused before onnxruntime sees it."""

import numpy as np
import onnxruntime as ort
import pytest

from runtime_ref.ort import OrtModel
from runtime_ref.sampling import Sampling
from tests.onnx.exporting import TIED, export, feed, token_ids
from tmexport.errors import UsageError
from tmexport.onnx.names import OnnxError


@pytest.fixture(scope="module")
def model(files):
    return OrtModel.load(files["portable", "f32"], threads=1)


def test_prefill_and_decode_are_the_session(model, files):
    ids = token_ids(TIED, 1, 40)
    want = feed(ort.InferenceSession(files["portable", "f32"]), TIED, ids)[0]
    state = model.new_state()
    got = [model.prefill(state, ids[0, :20])] + [model.decode(state, int(token)) for token in ids[0, 20:]]
    assert np.abs(np.stack(got) - want[19:]).max() < 1e-5 * (want.max() - want.min())


def test_logits_are_the_callers_own(model):
    state = model.new_state()
    first = model.decode(state, 5)
    kept = first.copy()
    model.decode(state, 6)
    model.decode(state, 7)
    assert np.array_equal(first, kept)


def test_two_states_do_not_meet(model):
    one, other = model.new_state(), model.new_state()
    model.prefill(one, [1, 2, 3])
    alone = model.decode(one, 4)
    model.prefill(other, [9, 8])
    one = model.new_state()
    model.prefill(one, [1, 2, 3])
    model.decode(other, 7)
    assert np.array_equal(model.decode(one, 4), alone)


def test_a_state_can_be_taken_out_and_put_back(model):
    state = model.new_state()
    model.prefill(state, [1, 2, 3])
    copy = model.state_from(state.arrays())
    assert np.array_equal(model.decode(state, 4), model.decode(copy, 4))


def test_a_batch(model):
    ids = token_ids(TIED, 3, 9)
    together, alone = model.new_state(3), [model.new_state() for _ in range(3)]
    model.run(together, ids[:, :8])
    found = model.run(together, ids[:, 8:])[:, 0]
    for row in range(3):
        model.prefill(alone[row], ids[row, :8])
        want = model.decode(alone[row], int(ids[row, 8]))
        assert np.abs(found[row] - want).max() < 1e-5 * (want.max() - want.min())


def test_generate_stops_and_repeats(model):
    greedy = list(model.generate([1, 2, 3], 10))
    assert list(model.generate([1, 2, 3], 10)) == greedy
    assert list(model.generate([1, 2, 3], 10, stop=(greedy[4],))) == greedy[: greedy.index(greedy[4]) + 1]
    assert list(model.generate([1, 2, 3], 10, Sampling(1e-6))) == greedy
    drawn = [list(model.generate([1, 2, 3], 10, Sampling(20.0, seed=seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_state_kept_in_place_has_the_bits_of_one_carried_by_hand(files, threads):
    """The ort form shares past_ssm's buffer with present_ssm; session.run with arrays does not."""
    from tests.onnx.exporting import zero_state

    ids = token_ids(TIED, 2, 40)
    model = OrtModel.load(files["ort", "q8"], threads=threads)
    ours, by_hand = model.new_state(2), zero_state(TIED, 2)
    for start, end in ((0, 17), (17, 18), (18, 19), (19, 21), (21, 22), (22, 40)):
        want = dict(zip([o.name for o in model.session.get_outputs()], model.session.run(None, {"input_ids": ids[:, start:end], **by_hand}), strict=True))  # fmt: skip
        assert np.array_equal(model.run(ours, ids[:, start:end]), want.pop("logits"))
        by_hand = {name.replace("present", "past"): value for name, value in want.items()}
    arrays = ours.arrays()
    assert arrays.keys() == by_hand.keys()
    assert all(np.array_equal(arrays[name], by_hand[name]) for name in arrays)


def test_genai_names_run(tied, tmp_path, model):
    other = OrtModel.load(export(tied, tmp_path / "m.onnx", "portable", "f32", io_names="genai"), threads=1)
    assert list(other.generate([5, 6], 5)) == list(model.generate([5, 6], 5))
    state = other.new_state()
    assert "past_key_values.1.recurrent_state" in state.arrays()


def test_bad_input_is_refused(model):
    state = model.new_state()
    with pytest.raises(UsageError, match="token 384 is outside the vocabulary of 384"):
        model.decode(state, 384)
    with pytest.raises(UsageError, match="token -1 is outside"):
        model.prefill(state, [0, -1])
    with pytest.raises(UsageError, match=r"the shape \[1, 0\]; expected \[1, at least 1\]"):
        model.prefill(state, [])
    with pytest.raises(UsageError, match=r"the shape \[2, 1\]; expected \[1, at least 1\]"):
        model.run(state, np.zeros((2, 1), np.int64))
    with pytest.raises(UsageError, match="temperature is -1"):
        list(model.generate([1], 1, Sampling(-1)))


def test_a_wrong_state_is_refused(model):
    arrays = model.new_state().arrays()
    with pytest.raises(OnnxError, match=r"past_ssm.1 is float32 \[1, 16, 32\]; expected float32 \[1, 16, 32, 32\]"):
        model.state_from(arrays | {"past_ssm.1": np.zeros((1, 16, 32), np.float32)})
    with pytest.raises(OnnxError, match="past_conv.0 is float64"):
        model.state_from(arrays | {"past_conv.0": arrays["past_conv.0"].astype(np.float64)})
    with pytest.raises(OnnxError, match="past_ssm.0 is nothing"):
        model.state_from({k: v for k, v in arrays.items() if k != "past_ssm.0"})
    with pytest.raises(OnnxError, match="the state has no past_conv.0"):
        model.state_from({})


def test_files_that_are_not_ours(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    with pytest.raises(OnnxError, match="no such file"):
        OrtModel.load(tmp_path / "none.onnx")
    (tmp_path / "m.onnx").write_bytes(b"\x00" * 100)
    with pytest.raises(OnnxError, match=r"onnxruntime .* cannot load it"):
        OrtModel.load(tmp_path / "m.onnx")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])  # fmt: skip
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 15)]), tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match="no tmexport metadata"):
        OrtModel.load(tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="0 threads"):
        OrtModel.load(tmp_path / "m.onnx", threads=0)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("tmexport.version", "3", "format version '3'; this release reads 1 and 2"),
    ("tmexport.config", "{", "metadata is damaged"),
    ("tmexport.config", '{"model_type": "mamba2"}', "hidden_size is missing"),
    ("tmexport.form", "fast", "form is 'fast'"),
    ("tmexport.io_names", "genai", r"the input past_key_values.0.conv_state is None, but the metadata says \['batch', 576, 3\]"),
    ("tmexport.group_size", "x", "metadata is damaged"),
])  # fmt: skip
def test_damaged_metadata(files, tmp_path, key, value, words):
    import onnx

    broken = onnx.load(files["ort", "q8"])
    for prop in broken.metadata_props:
        if prop.key == key:
            prop.value = value
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match=words):
        OrtModel.load(tmp_path / "m.onnx")


def test_metadata_of_another_model_is_refused(files, tmp_path):
    import onnx

    broken = onnx.load(files["ort", "q8"])
    for prop in broken.metadata_props:
        prop.value = prop.value.replace('"state_size": 32', '"state_size": 16')
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(OnnxError, match="the input past_conv.0 is .*576, 3.*, but the metadata says .*544, 3"):
        OrtModel.load(tmp_path / "m.onnx")
