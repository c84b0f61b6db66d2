"""Attention at contexts up to 4,096: the specification's bits at positions all over, and the same bits however they are reached."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from runtime_ref.kernels.isa import available
from runtime_ref.model import Model
from runtime_ref.reference import ReferenceModel
from runtime_ref.state import State
from runtime_ref.weights import load_weights, memory_source
from tests.runtime_ref.small import tensors
from tmexport.model import Block
from tmexport.model import Model as ModelSpec
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mlp import SwiGLU

LENGTH = 4096
SHAPES = {  # heads, heads of keys, their width, base of RoPE
    "groups of 3": (6, 2, 32, 10000.0),
    "one head of keys, no positions": (6, 1, 80, None),
    "no groups, wide heads": (2, 2, 128, 500000.0),
}
IDS = [int(i) for i in np.random.default_rng(1).integers(0, 96, LENGTH)]


def source_of(name):
    heads, kv_heads, width, theta = SHAPES[name]
    attention = Attention(64, heads, kv_heads, width, width**-0.5, theta)
    mlp = SwiGLU(64, 64)
    blocks = (Block((attention,)), Block((mlp,)), Block((attention,)))
    config = ModelSpec(64, 96, blocks, context_length=LENGTH)
    return memory_source(config, tensors(config, "q8_0"))


@pytest.fixture(scope="module")
def read():
    """By shape and profile: the model, the logits of all its tokens and the state behind them."""
    kept = {}

    def get(name, profile):
        if (name, profile) not in kept:
            model = Model(source_of(name), profile, 2)
            model.compile()  # the code for many rows too
            state = model.new_state()
            kept[name, profile] = model, np.concatenate(list(model.score(state, IDS))), state
        return kept[name, profile]

    return get


def sha(logits):
    return hashlib.sha256(np.ascontiguousarray(logits)).hexdigest()


@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_specifications_bits_at_positions_all_over(read, name, profile):
    """From the keys and values before a position, the specification gives the logits there, and the key and value it adds."""
    model, logits, state = read(name, profile)
    reference = ReferenceModel(load_weights(source_of(name)), profile)
    kept = reference.new_state()
    for position in (0, 15, 16, 63, 64, 100, 1023, 2048, 3333, LENGTH - 1):
        kept.tokens = position
        layers = [arrays for arrays in kept.branches if arrays]
        for index, arrays in enumerate(layers):
            for key in arrays:
                arrays[key] = state.arrays[key][index, :position].copy()
        assert reference.step(kept, IDS[position]).tobytes() == logits[position].tobytes(), position
        for index, arrays in enumerate(layers):
            for key in arrays:
                assert arrays[key][position].tobytes() == state.arrays[key][index, position].tobytes(), (position, key)
    assert model.config.context_length == LENGTH


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_threads_splits_batches_and_saved_states(read, tmp_path, profile):
    model, logits, _ = read("groups of 3", profile)
    state, at = model.new_state(), 0
    for number, length in enumerate((1, 700, 3, 65, 1279, 1, 40, 2006)):  # 4,095 in all
        model.threads = 1 + number % 3
        assert model.prefill(state, IDS[at : at + length]).tobytes() == logits[at + length - 1].tobytes(), at
        at += length
    state.save(tmp_path / "state")
    again = State.load(tmp_path / "state", model.new_state())
    states, lengths = [], (5, 1000, 2047, LENGTH - 1)
    for length in lengths[:-1]:
        states.append(model.new_state())
        model.prefill(states[-1], IDS[:length])
    batch = model.decode_batch([*states, again], [IDS[length] for length in lengths])
    assert [row.tobytes() for row in batch] == [logits[length].tobytes() for length in lengths]


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set(read, monkeypatch, isa):
    """2,048 tokens read 64 at a time, then some one by one."""
    _, wanted, _ = read("groups of 3", "fast")
    monkeypatch.setenv("RUNTIME_REF_ISA", isa)
    model = Model(source_of("groups of 3"), "fast", 1)
    model.compile()
    state = model.new_state()
    found = np.concatenate(list(model.score(state, IDS[:2048])))
    assert sha(found) == sha(wanted[:2048])
    for position in range(2048, 2053):
        assert model.decode(state, IDS[position]).tobytes() == wanted[position].tobytes()
