"""Models with attention in the runtime: the specification's bits, however a text is cut, kept or batched; and what peers compute."""

import json
import shutil
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

from qat.ptq.making import make
from runtime_ref.arithmetic import PRESETS
from runtime_ref.gguf_source import gguf_source
from runtime_ref.kernels.isa import available
from runtime_ref.memory import check_memory, need
from runtime_ref.model import Model
from runtime_ref.reference import ReferenceModel
from runtime_ref.reference.dense import DenseMatrix
from runtime_ref.state import STEP, State
from runtime_ref.weights import load_weights, memory_source
from tests.llama import Llama
from tests.models import train_tokenizer
from tests.tmexport.families import FAMILIES, save
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TmexportError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import gguf_values
from tmexport.gguf.reader import open_gguf
from tmexport.model.rope import angles

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 500, 40)]
NAMES = ("llama", "llama-tied-one-kv-head", "granite", "granite-rope-8-groups", "falcon", "falcon-norm-2-groups")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ternary files of every family, and transformers' own models that they were rounded from."""
    root, models = tmp_path_factory.mktemp("hybrids"), {}
    for name in FAMILIES:
        models[name] = save(name, root / name)
        train_tokenizer(root / name / "tokenizer.json")
        make("rtn", root / name, root / f"{name}-ternary")
        plan_export(open_checkpoint(root / f"{name}-ternary")).write(root / f"{name}.gguf", lambda tensor: None)
    return root, models


def reference(path, profile, ids):
    model = ReferenceModel(load_weights(gguf_source(path)), profile)
    state = model.new_state()
    return np.stack([model.step(state, i) for i in ids])


def same(a, b):
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_every_family_is_here():
    assert set(NAMES) == set(FAMILIES)


@pytest.mark.parametrize("profile", PRESETS)
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_have_the_specifications_bits(files, name, profile):
    path = files[0] / f"{name}.gguf"
    model, wanted = Model.load(path, profile, 2), reference(path, profile, IDS)
    assert same(np.concatenate(list(model.score(model.new_state(), IDS))), wanted)
    state = model.new_state()
    model.prefill(state, IDS[:13])
    assert same(model.decode(state, IDS[13]), wanted[13])
    other = state.copy()  # a text that goes on in two ways
    assert same(model.prefill(state, IDS[14:]), wanted[-1])
    assert same(model.prefill(other, IDS[14:]), wanted[-1])


@pytest.mark.parametrize("name", ["granite", "falcon"])
def test_saved_states_batches_and_threads(files, tmp_path, name):
    path = files[0] / f"{name}.gguf"
    model, wanted = Model.load(path, "fast", 1), reference(path, "fast", IDS)
    states = []
    for length in (5, 17, 33):  # texts of different lengths, decoded together
        states.append(model.new_state())
        model.prefill(states[-1], IDS[:length])
    states[1].save(tmp_path / "state")
    states[1] = State.load(tmp_path / "state", model.new_state())
    model.threads = 3
    logits = model.decode_batch(states, [IDS[5], IDS[17], IDS[33]])
    assert all(same(row, wanted[at]) for row, at in zip(logits, (5, 17, 33), strict=True))


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set(files, monkeypatch, isa):
    path = files[0] / "granite.gguf"
    monkeypatch.setenv("RUNTIME_REF_ISA", isa)
    model = Model.load(path, "exact", 1)
    assert same(model.prefill(model.new_state(), IDS[:20]), reference(path, "exact", IDS[:20])[-1])


@pytest.mark.parametrize("name", NAMES)
def test_the_specification_computes_what_transformers_computes(files, name):
    """With the weights in fp32 nothing is rounded but by fp32 itself."""
    root, models = files
    checkpoint = open_checkpoint(root / name)
    tensors = {}
    for tensor in checkpoint.config.tensors.values():
        values = gguf_values(tensor, checkpoint.dense(tensor.hf)).reshape(tensor.gguf_shape)
        if tensor.rotated is not None:  # a source has its rows in halves
            values = checkpoint.dense(tensor.hf)
        tensors[tensor.gguf] = DenseMatrix(values) if tensor.low_bit or tensor.matrix else values
    model = ReferenceModel(load_weights(memory_source(checkpoint.config, tensors)), "exact")
    state = model.new_state()
    found = np.stack([model.step(state, i) for i in IDS])
    with torch.no_grad():
        wanted = models[name](torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama", "granite", "falcon"])
def test_profile_fast_and_llamacpp_give_the_same_log_probabilities(files, name):
    path = files[0] / f"{name}.gguf"
    """llama.cpp sums attention's values in fp16 where we have fp32, and rounds what enters the head to fp16."""
    llama, model, differences = Llama(path), Model.load(path, "fast", 2), []
    tokens = llama.tokenize("Fellow citizens of the Senate")
    for token, log_probability in llama.greedy(tokens, 12):
        logits = model.prefill(model.new_state(), tokens).astype(np.float64)
        ours = logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        differences.append(abs(ours - log_probability))
        tokens = [*tokens, token]
    assert np.mean(differences) < 0.02
    assert max(differences) < 0.06


def test_the_state_grows_in_steps_up_to_the_context(files):
    model = Model.load(files[0] / "llama.gguf", "exact", 1)
    state = model.new_state()
    assert state.nbytes == 0
    model.prefill(state, IDS)
    shapes = {name: array.shape for name, array in state.arrays.items()}
    assert shapes == {"k": (3, STEP, 2, 64), "v": (3, STEP, 2, 64)}
    assert state.resized(len(IDS)).arrays["k"].shape == (3, len(IDS), 2, 64)
    assert need(open_gguf(files[0] / "llama.gguf"), "exact").states == 2 * 3 * 512 * 2 * 64 * 4  # a context of 512
    with pytest.raises(UsageError, match="the text has 520 tokens, but the model was made for 512"):
        model.prefill(state, [1] * 480)
    assert state.tokens == len(IDS)  # nothing of it was read


def test_a_stated_context_beyond_all_bounds_is_not_believed(files, tmp_path):
    """The tables are as long as the limit, and native code reads them at every position."""
    root = files[0]
    raw = json.loads((root / "llama-ternary" / "config.json").read_text()) | {"max_position_embeddings": 2**30}
    folder = shutil.copytree(root / "llama-ternary", tmp_path / "far")
    (folder / "config.json").write_text(json.dumps(raw))
    plan_export(open_checkpoint(folder)).write(tmp_path / "far.gguf", lambda tensor: None)
    model = Model.load(tmp_path / "far.gguf", "exact", 1)
    state = model.new_state()
    assert same(model.prefill(state, IDS[:5]), reference(root / "llama.gguf", "exact", IDS[:5])[-1])
    state.tokens = 2**20
    with pytest.raises(UsageError, match="has 1048577 tokens, but the model was made for 1048576"):
        model.prefill(state, [1])


def test_a_limit_of_memory_says_what_would_fit_where_rows_differ(files):
    """Falcon's rows of 384 and 320 do not divide into the blocks of its first projection."""
    path = files[0] / "falcon.gguf"
    with pytest.raises(TmexportError, match="needs .* MB of memory in profile exact .*; no smaller type is left"):
        check_memory(path, 100_000_000, "exact")


def test_angles_are_those_of_more_digits():
    """cos of p * theta^(-2 i / D) in 60 decimal digits, by its own series."""
    for position, i in ((0, 0), (63, 1), (64, 0), (700, 3), (100_000, 5)):
        cos, sin = angles(10000.0, 16, position)
        with localcontext() as context:
            context.prec = 60
            pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
            angle = (Decimal(position) * Decimal(10000) ** (-Decimal(i) / 8)) % (2 * pi)
            terms = [Decimal(1)]
            for n in range(1, 80):
                terms.append(terms[-1] * angle / n)
            wanted = (
                sum(t * (-1) ** (n // 2) for n, t in enumerate(terms) if n % 2 == 0),
                sum(t * (-1) ** (n // 2) for n, t in enumerate(terms) if n % 2),
            )
        assert abs(float(cos[i]) - float(wanted[0])) < 1e-7
        assert abs(float(sin[i]) - float(wanted[1])) < 1e-7
