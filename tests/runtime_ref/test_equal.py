"""The kernels give the specification's bits: every type, any split of the prompt, any number of threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_ref.arithmetic import PRESETS
from runtime_ref.model import Model
from runtime_ref.weights import memory_source
from tests.runtime_ref.small import CONFIG, TOKENS, all_logits, reference_logits, sha, source, tensors

KINDS = [
    ("ternary256", "q8_0", None),
    ("ternary64", "q4_0", None),
    ("f16", "f16", "q8_0"),
    ("f32", "f32", None),
    ("q8_0", "f16", "q4_0"),
]


@pytest.mark.parametrize(
    ("profile", "body", "embedding", "head"),
    [("exact", *kind) for kind in KINDS]
    + [("fast", *kind) for kind in KINDS[:3]],  # the others add no kernel of `fast`
)
def test_kernels_equal_the_specification(profile, body, embedding, head):
    src = source(body, embedding, head)
    want = reference_logits(src, profile, TOKENS)
    assert np.isfinite(want).all()
    assert want.std() > 0.05
    assert sha(all_logits(Model(src, profile, 1), TOKENS)) == sha(want)


@pytest.fixture(scope="module", params=PRESETS)
def case(request):
    """A model on 2 threads, and the logits of the specification."""
    src = source()
    return Model(src, request.param, 2), reference_logits(src, request.param, TOKENS)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_any_split_of_the_prompt_gives_the_same_bits(case, parts):
    model, want = case
    state, at = model.new_state(), 0
    for part in [*parts, len(TOKENS)]:
        piece = TOKENS[at : at + part]
        if not piece:
            break
        logits = model.decode(state, piece[0]) if len(piece) == 1 else model.prefill(state, piece)
        at += len(piece)
        assert sha(logits) == sha(want[at - 1])
    assert state.tokens == at


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("profile", PRESETS)
def test_any_number_of_threads_gives_the_same_bits(profile, threads):
    src = source()
    assert sha(all_logits(Model(src, profile, threads), TOKENS)) == sha(reference_logits(src, profile, TOKENS))


def test_a_prompt_longer_than_a_chunk_equals_decoding(case):
    model, _ = case
    tokens = [(7 * i) % CONFIG.vocab_size for i in range(150)]
    state = model.new_state()
    one_by_one = [model.decode(state, token) for token in tokens][-1]
    assert sha(model.prefill(model.new_state(), tokens)) == sha(one_by_one)


def test_a_batch_equals_each_alone(case):
    model, _ = case
    prompts = [TOKENS[:3], TOKENS[2:9], TOKENS[4:5], TOKENS[1:7]]
    states = [model.new_state() for _ in prompts]
    alone = []
    for state, prompt in zip(states, prompts, strict=True):
        model.prefill(state, prompt)
    copies = [state.copy() for state in states]
    for token in (3, 200):
        batch = model.decode_batch(states, [token + i for i in range(4)])
        alone = [model.decode(copy, token + i) for i, copy in enumerate(copies)]
        assert sha(batch) == sha(np.stack(alone))


def test_a_saved_state_continues_with_the_same_bits(case, tmp_path):
    model, want = case
    state = model.new_state()
    model.prefill(state, TOKENS[:6])
    state.save(tmp_path / "state")
    loaded = model.load_state(tmp_path / "state")
    assert loaded.tokens == 6
    assert sha(model.prefill(loaded, TOKENS[6:])) == sha(want[-1])


@pytest.mark.parametrize("profile", PRESETS)
@pytest.mark.parametrize("kind", ["zeros", "negative zeros", "denormal", "huge", "outlier"])
def test_adversarial_activations_equal_the_specification(kind, profile):
    src = source(embedding="f32")
    table = src.matrix("token_embd.weight").values
    table[:] = {"zeros": 0.0, "negative zeros": -0.0, "denormal": 1e-41, "huge": 1e30, "outlier": 1e-3}[kind]
    if kind == "huge":
        table[:, ::2] *= -1
    if kind == "outlier":
        table[:, ::64] = 3e4
    want = reference_logits(src, profile, TOKENS)
    assert np.isfinite(want).all()
    assert sha(all_logits(Model(src, profile, 1), TOKENS)) == sha(want)


def test_tied_and_untied_heads_of_equal_weights_agree():
    src = source()
    untied = memory_source(CONFIG, {**tensors(CONFIG), "output.weight": src.matrix("token_embd.weight")})
    tokens = TOKENS[:4]
    assert sha(all_logits(Model(untied, "exact", 1), tokens)) == sha(all_logits(Model(src, "exact", 1), tokens))
