"""Logits against transformers and torch, in plain onnxruntime and in onnx's own ReferenceEvaluator."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tests.onnx.exporting import (
    GROUPS,
    TIED,
    UNTIED,
    export,
    feed,
    peer_logits,
    peer_model,
    share_of_spread,
    token_ids,
    zero_state,
)


@pytest.fixture(scope="module")
def wanted(tied):
    """ids, transformers' logits with the fp32 embedding, and with gguf's Q8_0 embedding."""
    ids = token_ids(TIED, 2, 130)
    return ids, peer_logits(tied, ids), peer_logits(tied, ids, dequantize_embedding=True)


@pytest.mark.parametrize(
    "runner", [ort.InferenceSession, lambda path: ReferenceEvaluator(str(path))], ids=["onnxruntime", "reference"]
)
@pytest.mark.parametrize("form", ["portable", "custom"])
def test_fp32_forms_equal_transformers(files, wanted, form, runner):
    ids, exact, q8 = wanted
    assert share_of_spread(feed(runner(files[form, "f32"]), TIED, ids), exact) < 1e-5
    assert share_of_spread(feed(runner(files[form, "f16"]), TIED, ids), exact) < 1e-3
    assert share_of_spread(feed(runner(files[form, "q8"]), TIED, ids), q8) < 1e-5


@pytest.mark.parametrize("embedding", ["q8", "f16", "f32"])
def test_ort_form_is_within_int8_activations_of_transformers(files, wanted, embedding):
    ids, exact, _ = wanted
    found = feed(ort.InferenceSession(files["ort", embedding]), TIED, ids)
    assert share_of_spread(found, exact) < 0.02
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.03 * exact.std()


@pytest.mark.parametrize("form", ["portable", "custom", "ort"])
def test_untied_head(untied, tmp_path, form):
    ids = token_ids(UNTIED, 1, 40)
    found = feed(ort.InferenceSession(export(untied, tmp_path / "m.onnx", form, "f32")), UNTIED, ids)
    assert share_of_spread(found, peer_logits(untied, ids)) < (0.02 if form == "ort" else 1e-5)


@pytest.mark.parametrize("form", ["portable", "custom", "ort"])
def test_two_groups_of_b_and_c_equal_torch(groups, tmp_path, form):
    """The peer is qat's model: transformers normalises over all groups at once, mamba_ssm (and we) over each."""
    from qat.model import load_model

    ids = token_ids(GROUPS, 2, 100)
    with torch.no_grad():
        want = load_model(groups.path)(torch.from_numpy(ids)).numpy()
    found = feed(ort.InferenceSession(export(groups, tmp_path / "m.onnx", form, "f32")), GROUPS, ids)
    assert share_of_spread(found, want) < (0.02 if form == "ort" else 1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 128, 129])
def test_every_length_around_a_chunk(files, wanted, length):
    """Logits do not look ahead, so those of a prefix are the first ones of the whole."""
    ids, exact, _ = wanted
    found = feed(ort.InferenceSession(files["portable", "f32"]), TIED, ids[:1, :length])
    assert share_of_spread(found, exact[:1, :length]) < 1e-5


def run_in_parts(session, config, ids, cuts):
    """Logits and the last state of ids fed in parts, the state carried by hand."""
    state, parts = zero_state(config, len(ids)), []
    names = [output.name for output in session.get_outputs()]
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        results = dict(zip(names, session.run(names, {"input_ids": ids[:, start:end], **state}), strict=True))
        parts.append(results.pop("logits"))
        state = {name.replace("present", "past"): value for name, value in results.items()}
    return np.concatenate(parts, axis=1), state


@pytest.mark.parametrize("form", ["portable", "custom", "ort"])
@pytest.mark.parametrize("cuts", [(1,), (64,), (99,), (1, 2, 3, 50), tuple(range(1, 100))])
def test_any_split_gives_the_same_logits_and_state(files, form, cuts):
    session, ids = ort.InferenceSession(files[form, "q8"]), token_ids(TIED, 2, 100)
    whole, end = run_in_parts(session, TIED, ids, ())
    found, state = run_in_parts(session, TIED, ids, cuts)
    # ort: another order of additions may tip the rounding of an 8-bit activation
    assert share_of_spread(found, whole) < (0.01 if form == "ort" else 1e-5)
    for name in end:
        assert np.abs(state[name] - end[name]).max() < (0.02 if form == "ort" else 1e-5) * np.abs(end[name]).max()


@pytest.mark.parametrize("form", ["portable", "custom", "ort"])
def test_a_batch_is_its_rows(files, form):
    session, ids = ort.InferenceSession(files[form, "q8"]), token_ids(TIED, 3, 20)
    together = feed(session, TIED, ids)
    alone = np.concatenate([feed(session, TIED, ids[i : i + 1]) for i in range(3)])
    assert share_of_spread(together, alone) < (0.01 if form == "ort" else 1e-5)


@pytest.mark.parametrize("form", ["portable", "ort"])
def test_state_is_the_transpose_of_the_cache_of_transformers(files, tied, form):
    ids = token_ids(TIED, 1, 50)
    with torch.no_grad():
        cache = peer_model(tied)(torch.from_numpy(ids), use_cache=True).cache_params
    _, state = run_in_parts(ort.InferenceSession(files[form, "f32"]), TIED, ids, ())
    for i in range(TIED.n_layer):
        conv = next(iter(cache.layers[i].conv_states.values())).numpy()[
            :, :, 1:
        ]  # theirs keeps d_conv inputs, of which the oldest is unused
        ssm = next(iter(cache.layers[i].recurrent_states.values())).numpy().swapaxes(2, 3)
        limit = 1e-5 if form == "portable" else 0.1  # int8 activations
        assert np.abs(state[f"past_conv.{i}"] - conv).max() < limit * np.abs(conv).max()
        assert np.abs(state[f"past_ssm.{i}"] - ssm).max() < limit * np.abs(ssm).max()


@pytest.mark.parametrize("form", ["portable", "custom", "ort"])
def test_last_logits_are_the_last_of_all(files, tied, tmp_path, form):
    ids = token_ids(TIED, 2, 30)
    every = feed(ort.InferenceSession(files[form, "q8"]), TIED, ids)
    last = feed(ort.InferenceSession(export(tied, tmp_path / "m.onnx", form, "q8", logits="last")), TIED, ids)
    assert last.shape == (2, 1, TIED.vocab_size)
    assert share_of_spread(last, every[:, -1:]) < (0.01 if form == "ort" else 1e-5)


def test_strong_decay_and_long_prompts_stay_finite(tied, tmp_path):
    """A of -16 over 2000 steps with a large dt: exponentials far below the smallest fp32, and no NaN."""
    from tests.models import mixer, ternary_tensors
    from tmexport.checkpoint import open_checkpoint, write_checkpoint

    tensors = ternary_tensors(TIED, 64)
    for i in range(TIED.n_layer):
        tensors[f"backbone.layers.{i}.mixer.A_log"] = np.full(mixer(TIED).n_heads, np.log(16.0), np.float32)
        tensors[f"backbone.layers.{i}.mixer.dt_bias"] = np.full(mixer(TIED).n_heads, 30.0, np.float32)
    write_checkpoint(tmp_path / "ckpt", TIED, tensors)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    ids = token_ids(TIED, 1, 2000)
    want = peer_logits(checkpoint, ids[:, :200])
    for form in ("portable", "ort"):
        found = feed(ort.InferenceSession(export(checkpoint, tmp_path / "m.onnx", form, "f32")), TIED, ids)
        assert np.isfinite(found).all()
        assert form == "ort" or share_of_spread(found[:, :200], want) < 1e-4
