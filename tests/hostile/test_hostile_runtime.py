"""Nothing unchecked reaches native code: tokens, states, files of states, matrices in memory, damaged GGUFs."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from runtime_ref.command import for_terminal
from runtime_ref.errors import NumericsError, StateError
from runtime_ref.model import Model
from runtime_ref.reference.blocks import BlockMatrix
from runtime_ref.reference.dense import DenseMatrix
from runtime_ref.reference.ternary import TernaryMatrix
from runtime_ref.sampling import Sampling, choose
from runtime_ref.tokenizer import Tokenizer
from runtime_ref.weights import memory_source
from tests.hostile.builders import (  # fmt: skip
    BF16,
    BLOCKS,
    F16,
    F32,
    Q2_0,
    Q4_0,
    Q8_0,
    STRING,
    TQ1_0,
    TQ2_0,
    Gguf,
    floats,
    model,
    tokenizer_json,
    value,
)
from tests.hostile.mutate import mutate
from tests.hostile.targets import accepts, accepts_gguf
from tests.models import mixer
from tests.runtime_ref.small import CONFIG, tensors
from tmexport.errors import GGUFError, TmexportError, TokenizerError, UsageError

ROOT = Path(__file__).resolve().parents[2]
EMBED, IN, OUT = "token_embd.weight", "blk.0.ssm_in.weight", "blk.0.ssm_out.weight"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("runtime") / "m.gguf"
    path.write_bytes(model(Q2_0, state=16).build())
    return path


@pytest.fixture(scope="module")
def loaded(path):
    return Model.load(path, "exact", 2)


@pytest.mark.parametrize(
    "tokens",
    [[16], [-1], [0, 16], [2**31], [2**63], [2**64], [-(2**63)], [1.5], [1.0], [float("nan")], ["1"], [None], [True], [[1.5]], [b"1"],
     np.array([2**64 - 1], np.uint64), np.array([1.0]), np.array([1.5], object)],
    ids=repr,
)  # fmt: skip
def test_tokens_that_are_none(loaded, tokens):
    state = loaded.new_state()
    with pytest.raises(UsageError, match=r"token .* is outside the vocabulary|tokens are .*; expected whole numbers"):
        loaded.prefill(state, tokens)
    with pytest.raises(UsageError):
        list(loaded.score(state, tokens))
    if len(tokens) == 1:
        with pytest.raises(UsageError):
            loaded.decode(state, tokens[0])
        with pytest.raises(UsageError):
            loaded.decode_batch([state], tokens)
    assert state.tokens == 0
    assert not state.arrays["ssm"].any()


def test_no_tokens_and_batches_that_do_not_match(loaded):
    state = loaded.new_state()
    with pytest.raises(UsageError, match="the prompt has no tokens"):
        loaded.prefill(state, [])
    for states, tokens in (([], []), ([state, state], [1, 2]), ([state], [1, 2]), ([state, loaded.new_state()], [1])):
        with pytest.raises(ValueError, match="expected distinct states and one token for each"):
            loaded.decode_batch(states, tokens)


@pytest.mark.parametrize("part", ["conv", "ssm"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda a: a[..., None], lambda a: a[..., :-1], lambda a: np.concatenate([a, a]), lambda a: a.astype(np.float64), lambda a: a.astype(np.float16),
        lambda a: np.asfortranarray(a), lambda a: np.repeat(a, 2, axis=-1)[..., ::2], lambda a: a[..., ::-1], lambda a: a.reshape(-1),
        lambda a: a.astype(">f4"), lambda a: a.tolist(), lambda a: None, lambda a: np.zeros(0, np.float32), lambda a: np.broadcast_to(a[:1], a.shape),
        lambda a: np.frombuffer(a.tobytes(), np.float32).reshape(a.shape), lambda a: np.frombuffer(b"x" + bytearray(a.nbytes), np.float32, offset=1, count=a.size).reshape(a.shape),
    ],
    ids=["axis", "short", "long", "fp64", "fp16", "fortran", "strided", "reversed", "flat", "big-endian", "list", "none", "empty", "broadcast",
         "read-only", "unaligned"],
)  # fmt: skip
def test_states_that_are_none(loaded, part, damage):
    state = loaded.new_state()
    good = state.arrays[part]
    bad = damage(good)
    if isinstance(bad, np.ndarray) and bad.shape == good.shape and bad.dtype == good.dtype and bad.flags.carray:
        pytest.fail("not damaged")
    state.arrays[part] = bad
    with pytest.raises(StateError, match=rf"the state's {part} is not a writeable, contiguous float32 array of shape"):
        loaded.decode(state, 1)
    with pytest.raises(StateError):
        loaded.decode_batch([loaded.new_state(), state], [1, 2])


def test_another_models_state(loaded, path, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(model(Q2_0, state=16).with_tensor("output_norm.weight", data=floats((64,), seed=7)).build())
    with pytest.raises(StateError, match="the state belongs to another model or profile"):
        loaded.decode(Model.load(other).new_state(), 1)
    with pytest.raises(StateError, match="the state belongs to another model or profile"):
        loaded.decode(Model.load(path, "fast").new_state(), 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["conv", "ssm"])
def test_a_state_with_bad_values_is_reported(loaded, part, bad):
    state = loaded.new_state()
    state.arrays[part][...] = bad
    with pytest.raises(NumericsError, match="an Inf or a NaN appears in the output of layer 0"):
        loaded.decode(state, 1)


def test_a_closed_model_does_not_wait_for_its_threads(path):
    model_ = Model.load(path, threads=3)
    state = model_.new_state()
    model_.decode(state, 1)
    model_.close()
    with pytest.raises(RuntimeError, match="the model is closed"):
        model_.decode(state, 1)


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**40])
def test_absurd_numbers_of_threads(path, threads):
    with pytest.raises(UsageError, match=rf"{threads} threads; expected 1 to 1024"):
        Model.load(path, threads=threads)


# --- saved states ----------------------------------------------------------------------------------------------------


def test_damaged_state_files_are_refused(loaded, tmp_path):
    file, rng = tmp_path / "s", random.Random(0)
    state = loaded.new_state()
    loaded.prefill(state, [1, 2, 3])
    state.save(file)
    whole = file.read_bytes()
    words = [b"F16", b"BF16", b"I64", b"conv", b"ssm", b"null", b"tokens", b"exact", b"fast", b"[", b"{"]
    refused = 0
    for number in range(400):
        file.write_bytes(whole[: number * 7] if number < 100 else mutate(whole[:700], rng, words) + whole[700:])
        refused += not accepts(lambda: loaded.decode(loaded.load_state(file), 1))
    assert refused > 300


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "cannot be read as a saved state"), ("[]", "is not a saved state"), ("{}", "is not a saved state"), ("[" * 100_000, "cannot be read"),
        ({"format": "x"}, "is not a saved state"), ({"model": "0" * 16}, "was saved with the model 0000000000000000; expected"),
        ({"profile": "fast"}, "was saved with the profile fast; expected exact"), ({"tokens": -1}, "the token count is -1"),
        ({"tokens": 1.5}, "the token count is 1.5"), ({"tokens": True}, "the token count is True"), ({"tokens": None}, "the token count is None"),
    ],
    ids=range(11),
)  # fmt: skip
def test_a_state_file_that_lies(loaded, tmp_path, about, message):
    state = loaded.new_state()
    valid = {"format": "runtime_ref-state-1", "model": state.model, "profile": "exact", "tokens": 0}
    text = about if isinstance(about, str) else json.dumps(valid | about)
    (tmp_path / "s").write_bytes(save(state.arrays, {"runtime_ref": text}))
    with pytest.raises(StateError, match=message):
        loaded.load_state(tmp_path / "s")


def test_state_files_of_other_shapes_and_what_is_no_file(loaded, tmp_path):
    state = loaded.new_state()
    about = {"runtime_ref": json.dumps({"format": "runtime_ref-state-1", "model": state.model, "profile": "exact", "tokens": 0})}  # fmt: skip
    for arrays, message in [
        ({"conv": state.arrays["conv"]}, "cannot be read as a saved state"),
        ({"conv": state.arrays["conv"], "ssm": state.arrays["ssm"][:, :, :-1].copy()}, r"ssm is float32 \[1, 1, 63, 16\]; expected float32 \[1, 1, 64, 16\]"),
        ({"conv": state.arrays["conv"].astype(np.float64), "ssm": state.arrays["ssm"]}, "conv is float64"),
    ]:  # fmt: skip
        (tmp_path / "s").write_bytes(save(arrays, about))
        with pytest.raises(StateError, match=message):
            loaded.load_state(tmp_path / "s")
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "pipe", "."):
        with pytest.raises(StateError, match="no such file; expected a saved state"):
            loaded.load_state(tmp_path / name)


# --- models ----------------------------------------------------------------------------------------------------------


def refused(tmp_path, broken: Gguf, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(broken.build())
    with pytest.raises(TmexportError, match=message):
        Model.load(tmp_path / "m.gguf")


def poke(kind: int, name: str, at: int, new: bytes) -> Gguf:
    base = model(kind, state=16)
    data = bytearray(base.tensor(name).data)
    data[at : at + len(new)] = new
    return base.with_tensor(name, data=bytes(data))


def test_dimensions_the_kernels_do_not_compute(tmp_path):
    refused(tmp_path, model(Q2_0), "d_state is 8; this runtime needs a multiple of 16")


@pytest.mark.parametrize("kind", [Q2_0, TQ1_0, TQ2_0])
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0x8000, 0x0001, 0xBC00], ids=["NaN", "inf", "-0", "subnormal", "-1"])
def test_scales_that_are_no_scales(tmp_path, kind, bits):
    size = BLOCKS[kind][1]
    broken = poke(kind, OUT, 5 * size + (0 if kind == Q2_0 else size - 2), struct.pack("<H", bits))
    refused(tmp_path, broken, rf"{OUT}: row 5, block 0 has the scale")


@pytest.mark.parametrize(("kind", "at", "byte"), [(Q2_0, 17, 0xC0), (TQ2_0, 63, 0x30), (TQ1_0, 7, 1), (TQ1_0, 49, 2)])
def test_codes_that_are_no_codes(tmp_path, kind, at, byte):
    broken = poke(kind, OUT, 3 * BLOCKS[kind][1] + at, bytes([byte]))
    refused(tmp_path, broken, rf"{OUT}: row 3, block 0")


@pytest.mark.parametrize("kind", [F32, F16, BF16, Q8_0, Q4_0])
def test_values_that_are_not_finite(tmp_path, kind):
    size, n_bytes = BLOCKS[kind]
    nan = {F32: struct.pack("<f", np.nan), BF16: b"\xc0\x7f"}.get(kind, b"\0\x7e")
    data = bytearray(16 * 64 // size * n_bytes)
    data[3 * n_bytes : 3 * n_bytes + len(nan)] = nan
    refused(tmp_path, model(Q2_0, state=16).with_tensor(EMBED, kind=kind, data=bytes(data)), f"{EMBED}: .*(NaN|nan)")


def test_projections_whose_types_share_no_group(tmp_path):
    """TQ2_0 has groups of 256, but the rows of the other projection have 64 or 320 weights."""
    narrow = model(Q2_0, state=16).with_key("tmexport.group_size", None)
    heads = 4
    rows = 2 * 256 + 2 * 16 + heads
    from tests.hostile.builders import U32, ternary_blocks

    mixed = narrow.with_key("mamba2.ssm.inner_size", value(U32, 256)).with_key(
        "mamba2.ssm.time_step_rank", value(U32, heads)
    )
    mixed = mixed.with_tensor(IN, dims=(64, rows), data=ternary_blocks(Q2_0, rows, 64))
    mixed = mixed.with_tensor(OUT, dims=(256, 64), kind=TQ2_0, data=ternary_blocks(TQ2_0, 64, 256))
    channels = 256 + 32
    for name, shape in (("ssm_conv1d.weight", (channels, 4)), ("ssm_conv1d.bias", (channels,)), ("ssm_dt.bias", (heads,)), ("ssm_a", (heads, 1)),
                        ("ssm_d", (heads, 1)), ("ssm_norm.weight", (1, 256))):  # fmt: skip
        mixed = mixed.with_tensor(f"blk.0.{name}", dims=shape[::-1], data=floats(shape))
    refused(tmp_path, mixed, rf"{OUT} has rows that do not divide into groups as other tensors' do")


def test_damaged_data_is_refused_by_the_runtime_exactly_when_the_reader_refuses_it(tmp_path):
    """Two decoders, written independently, read the same stranger's bytes."""
    path, rng = tmp_path / "m.gguf", random.Random(0)
    agreed = {True: 0, False: 0}
    for kind in (Q2_0, TQ1_0, TQ2_0):
        base = model(kind, state=16)
        whole, start = base.build(), len(base.header())
        spans = list(range(start + 64, len(whole)))
        for _ in range(40):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.choice(spans)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            expected = accepts_gguf(path)
            assert accepts(lambda: Model.load(path, threads=1)) == expected
            agreed[expected] += 1
    assert min(agreed.values()) > 10


def _ternary(n, k, group=256):
    return TernaryMatrix(np.zeros((n, k), np.int8), np.ones((n, k // group), np.float16))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (IN, _ternary(mixer(CONFIG).d_in_proj - 16, CONFIG.d_model)), (IN, _ternary(mixer(CONFIG).d_in_proj + 16, CONFIG.d_model)),
        (IN, _ternary(mixer(CONFIG).d_in_proj, CONFIG.d_model * 2)), (OUT, _ternary(CONFIG.d_model, mixer(CONFIG).d_inner // 2)),
        (OUT, DenseMatrix(np.zeros((CONFIG.d_model, mixer(CONFIG).d_inner - 16), np.float32))),
        (EMBED, BlockMatrix(np.zeros((CONFIG.vocab_size - 40, CONFIG.d_model), np.int8), np.ones((CONFIG.vocab_size - 40, CONFIG.d_model // 32), np.float16))),
        (EMBED, BlockMatrix(np.zeros((CONFIG.vocab_size, CONFIG.d_model), np.int8), np.ones((CONFIG.vocab_size, CONFIG.d_model // 64), np.float16))),
        (EMBED, DenseMatrix(np.zeros((CONFIG.vocab_size, CONFIG.d_model), np.float64))), (EMBED, _ternary(CONFIG.vocab_size - 40, CONFIG.d_model)),
    ],
    ids=range(9),
)  # fmt: skip
def test_matrices_of_the_wrong_shape_or_type(name, wrong):
    with pytest.raises(GGUFError, match=name):
        Model(memory_source(CONFIG, tensors(CONFIG) | {name: wrong}))


@pytest.mark.parametrize(
    "name", ["blk.0.ssm_a", "blk.1.ssm_conv1d.weight", "output_norm.weight", "blk.0.attn_norm.weight"]
)
def test_vectors_of_the_wrong_shape(name):
    named = tensors(CONFIG)
    with pytest.raises((ValueError, TmexportError)):
        Model(memory_source(CONFIG, named | {name: named[name].reshape(-1)[:-1]}))


# --- text ------------------------------------------------------------------------------------------------------------


def test_text_that_is_not_unicode_and_files_without_a_tokenizer(path, tmp_path):
    with pytest.raises(
        TokenizerError, match=r"has no tokenizer.huggingface.json and no vocabulary; give the model's tokenizer.json"
    ):
        Tokenizer.from_gguf(path)
    base = model(Q2_0, state=16)
    for text, message in [
        ("{}", "is not a tokenizer.json"),
        (json.dumps(tokenizer_json() | {"normalizer": {"type": "Lowercase"}}), "component of type"),
    ]:
        (tmp_path / "m.gguf").write_bytes(base.with_key("tokenizer.huggingface.json", value(STRING, text)).build())
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.from_gguf(tmp_path / "m.gguf")
    larger = base.with_key("tokenizer.huggingface.json", value(STRING, json.dumps(tokenizer_json()))).build()
    (tmp_path / "m.gguf").write_bytes(larger)
    with pytest.raises(TokenizerError, match="has the token id 257, but .* has 16 embeddings; it is another model's"):
        Tokenizer.from_gguf(tmp_path / "m.gguf")
    with pytest.raises(UsageError, match="the text is not valid Unicode"):
        Tokenizer(json.dumps(tokenizer_json()), "here").encode("a\udcffb")


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e30, 1e308])
def test_any_temperature_chooses_a_token(temperature):
    logits, rng = np.array([1.0, 3.0, 2.0, -1e30], np.float32), np.random.default_rng(0)
    chosen = [choose(logits, Sampling(temperature), rng) for _ in range(50)]
    assert set(chosen) <= {0, 1, 2, 3}
    if temperature < 1:
        assert set(chosen) == {1}


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1}, {"top_p": 0.0},
                                    {"top_p": 1.5}, {"top_p": float("nan")}], ids=repr)  # fmt: skip
def test_sampling_that_cannot_be(values):
    with pytest.raises(UsageError, match="expected"):
        replace(Sampling(), **values)


def test_a_models_words_cannot_reprogram_a_terminal():
    assert for_terminal("a\x1b[2J\x9b\x07\r\u202eb\n\t\u00e9") == "a\ufffd[2J\ufffd\ufffd\ufffd\ufffdb\n\t\u00e9"


def test_ctrl_c_while_a_text_is_made(tmp_path):
    path = tmp_path / "m.gguf"
    text = value(STRING, json.dumps(tokenizer_json()))
    path.write_bytes(model(Q2_0, vocab=258, state=16).with_key("tokenizer.huggingface.json", text).build())
    command = [
        sys.executable,
        "-m",
        "runtime_ref.generate",
        path,
        "--prompt",
        "he",
        "-n",
        "100000000",
        "--threads",
        "2",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(3)[:2] == b"he"  # the prompt, and the first byte of what follows
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
