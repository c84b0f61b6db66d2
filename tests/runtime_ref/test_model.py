"""Loading, states, errors: what a program that uses the runtime sees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_ref.errors import NumericsError, StateError
from runtime_ref.gguf_source import read_matrix
from runtime_ref.kernels.kinds import pack, read_packed
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling, choose
from runtime_ref.weights import memory_source
from tests.models import SMALL, ternary_tensors
from tests.runtime_ref.small import CONFIG, TOKENS, all_logits, sha, source, tensors
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import GGUFError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import group_sizes_of
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """One ternary checkpoint with groups of 256, as a GGUF of every ternary type."""
    folder = tmp_path_factory.mktemp("models")
    write_checkpoint(folder / "ckpt", SMALL, ternary_tensors(SMALL), None)
    paths = {}
    for kind in ("tq1_0", "tq2_0", "q2_0"):
        for embedding in ("q8_0",) if kind != "tq2_0" else ("q8_0", "q4_0", "f16"):
            path = folder / f"{kind}-{embedding}.gguf"
            plan_export(open_checkpoint(folder / "ckpt"), kind, embedding).write(path, lambda t: None)
            paths[kind, embedding] = path
    return paths


def test_the_container_does_not_matter_in_exact(exported):
    digests = {
        kind: sha(all_logits(Model.load(exported[kind, "q8_0"], "exact", 1), TOKENS))
        for kind in ("tq1_0", "tq2_0", "q2_0")
    }
    assert len(set(digests.values())) == 1


@pytest.mark.parametrize(
    ("kind", "embedding", "name"),
    [
        ("tq1_0", "q8_0", "blk.1.ssm_in.weight"),
        ("tq2_0", "q8_0", "blk.1.ssm_in.weight"),
        ("q2_0", "q8_0", "blk.0.ssm_out.weight"),
        ("tq2_0", "q8_0", "token_embd.weight"),
        ("tq2_0", "q4_0", "token_embd.weight"),
        ("tq2_0", "f16", "output.weight"),
    ],
)
def test_repacking_a_file_equals_packing_the_decoded_matrix(exported, kind, embedding, name):
    gguf = open_gguf(exported[kind, embedding])
    group = group_sizes_of(gguf).get(name)
    assert group == (256 if name.startswith("blk.") else None)
    want = pack(read_matrix(gguf, name, group))
    got = read_packed(gguf, name, group)
    assert type(got) is type(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("kind", "byte", "value", "message"),
    [
        ("tq1_0", 0, 1, "no base-3 digits give"),
        ("tq1_0", 48, 2, "no base-3 digits give"),
        ("tq2_0", 0, 0xFF, "the 2-bit code 3"),
        ("q2_0", 2, 0xFF, "the 2-bit code 3"),
        ("tq2_0", 65, 0xFF, "the scale"),
        ("q2_0", 1, 0x3C, "different scales"),
    ],
)
def test_damaged_blocks_are_refused_with_the_tensor_named(exported, tmp_path, kind, byte, value, message):
    name = "blk.1.ssm_out.weight"
    data = bytearray(exported[kind, "q8_0"].read_bytes())
    data[open_gguf(exported[kind, "q8_0"]).tensors[name].offset + byte] = value
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(GGUFError, match=f"{name}.*{message}"):
        Model.load(tmp_path / "bad.gguf", "exact", 1)


@pytest.fixture(scope="module")
def model():
    return Model(source(), "exact", 1)


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_a_token_outside_the_vocabulary_is_refused(model, token):
    with pytest.raises(UsageError, match="outside the vocabulary of 300"):
        model.decode(model.new_state(), token)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UsageError, match="no tokens"):
        model.prefill(model.new_state(), [])


def test_a_state_of_another_model_or_profile_is_refused(model, tmp_path):
    other = Model(source(seed=1), "exact", 1)
    with pytest.raises(StateError, match="another model"):
        model.decode(other.new_state(), 0)
    other.new_state().save(tmp_path / "state")
    with pytest.raises(StateError, match="was saved with the model"):
        model.load_state(tmp_path / "state")
    for profile in ("fast", "compact"):
        Model(source(), profile, 1).new_state().save(tmp_path / "state")
        with pytest.raises(StateError, match=f"was saved with the profile {profile}"):
            model.load_state(tmp_path / "state")


@pytest.mark.parametrize("damage", ["missing", "text", "truncated", "safetensors without our name"])
def test_a_damaged_state_file_is_refused(model, tmp_path, damage):
    from safetensors.numpy import save

    path = tmp_path / "state"
    model.new_state().save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(save({"conv": np.zeros(3)}))
    with pytest.raises(StateError, match="state"):
        model.load_state(path)


@pytest.mark.parametrize(
    ("name", "index", "value", "where"),
    [
        ("blk.1.ssm_d", (3, 0), np.nan, "layer 1"),
        ("blk.0.ssm_conv1d.bias", 5, np.inf, "layer 0"),
        ("token_embd.weight", (5, 7), np.nan, "the embedding"),
    ],
)
def test_the_layer_where_a_nan_appears_is_named(name, index, value, where):
    named = tensors(CONFIG, embedding="f32")
    target = named[name]
    (target.values if name == "token_embd.weight" else target)[index] = value
    model = Model(memory_source(CONFIG, named), "exact", 1)
    with pytest.raises(NumericsError, match=f"Inf or a NaN .*{where}"):
        model.decode(model.new_state(), 5)


def test_an_overflow_in_the_head_is_named():
    named = tensors(CONFIG, embedding="f32")
    named["token_embd.weight"].values[250] = 3e38
    model = Model(memory_source(CONFIG, named), "exact", 1)
    with pytest.raises(NumericsError, match="the head"):
        model.decode(model.new_state(), 5)


def test_dimensions_the_kernels_cannot_run_are_refused():
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=32, d_state=24)
    with pytest.raises(GGUFError, match="d_state is 24"):
        Model(memory_source(config, tensors(config)), "exact", 1)


def test_generate_is_greedy_and_stops(model):
    state = model.new_state()
    logits = model.prefill(state, TOKENS)
    want = []
    for _ in range(5):
        want.append(int(np.argmax(logits)))
        logits = model.decode(state, want[-1])
    assert list(model.generate(TOKENS, 5)) == want
    assert list(model.generate(TOKENS, 5, stop=[want[0]])) == want[:1]


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_sampling_keeps_to_top_k(seed, k):
    logits = np.random.default_rng(seed).standard_normal(50).astype(np.float32)
    allowed = set(np.argsort(-logits)[:k].tolist())
    rng = np.random.default_rng(0)
    assert {choose(logits, Sampling(1.0, top_k=k), rng) for _ in range(50)} <= allowed


def test_sampling_follows_the_probabilities_and_top_p():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)
    counts = np.bincount([choose(logits, Sampling(1.0), rng) for _ in range(4000)], minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    assert {choose(logits, Sampling(1.0, top_p=0.7), rng) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_refuses_nonsense(bad):
    with pytest.raises(UsageError):
        Sampling(**bad)
