"""Broken and malicious GGUF files: each is refused with one line that names the offset, the key or the tensor."""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import gguf as peer
import numpy as np
import pytest

from tests.hostile.builders import (
    ARRAY,
    BOOL,
    DOUBLE,
    F32,
    FLOAT,
    I8,
    I32,
    Q2_0,
    Q8_0,
    STRING,
    TQ1_0,
    TQ2_0,
    U8,
    U32,
    U64,
    Gguf,
    Tensor,
    floats,
    model,
    value,
)  # fmt: skip
from tests.hostile.expecting import refused
from tests.hostile.targets import accepts_gguf, peak_bytes
from tmexport.errors import GGUFError
from tmexport.gguf.reader import open_gguf

PLAIN = model()
IN, OUT, EMBED = "blk.0.ssm_in.weight", "blk.0.ssm_out.weight", "token_embd.weight"


@pytest.mark.parametrize("kind", [Q2_0, TQ1_0, TQ2_0])
def test_the_unbroken_file_is_read_and_a_peer_agrees(tmp_path, kind):
    path = tmp_path / "m.gguf"
    path.write_bytes(model(kind).build())
    assert accepts_gguf(path)
    if kind != Q2_0:  # gguf 0.19 does not know id 42
        theirs = {t.name: t for t in peer.GGUFReader(path).tensors}
        ours = open_gguf(path)
        assert {n: t.offset for n, t in ours.tensors.items()} == {n: t.data_offset for n, t in theirs.items()}
        assert all(np.array_equal(ours.blocks(n).ravel(), t.data.view(np.uint8).ravel()) for n, t in theirs.items())


def test_truncation_at_every_byte_of_the_header_and_through_the_data(tmp_path):
    whole, header = PLAIN.build(), len(PLAIN.header())
    last = len(whole) - 256 % 32  # the last tensor has no padding that could go missing
    for length in [*range(header + 64), *range(header + 64, last, 97), last - 1]:
        refused(tmp_path, whole[:length], r"ends at byte|has \d+ bytes|truncated|promises|reaches to byte")


def test_a_file_cut_inside_the_data_names_the_tensor(tmp_path):
    refused(
        tmp_path, PLAIN.build()[:-1], r"'output_norm.weight' reaches to byte \d+, but the file has \d+; it is truncated"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"GGML"}, r"starts with b'GGML'; expected b'GGUF'"),
        ({"version": struct.pack("<I", 1)}, r"version 1; expected 2 or 3"),
        ({"version": struct.pack("<I", 4)}, r"version 4; expected 2 or 3"),
        ({"version": struct.pack(">I", 3)}, r"big-endian"),
        ({"n_tensors": 2**64 - 1}, r"promises 18446744073709551615 tensors"),
        ({"n_tensors": 2**63}, r"promises"),
        ({"n_keys": 2**64 - 1}, r"promises 11 tensors and 18446744073709551615 keys"),
        ({"n_tensors": 12}, r"ends at byte|dimensions|twice|claims"),
        ({"n_tensors": 10}, r"starts at offset|has no tensor|reaches"),
        ({"extra_keys": [("general.file_type", value(U32, 1))]}, r"has the key 'general.file_type' twice"),
    ],
)  # fmt: skip
def test_the_fixed_header(tmp_path, changes, message):
    refused(tmp_path, replace(PLAIN, **changes), message)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (struct.pack("<IQ", STRING, 2**63), r"ends at byte \d+ inside the value of 'k'"),
        (struct.pack("<IQ", STRING, 2**64 - 1), r"ends at byte \d+ inside the value of 'k'"),
        (value(STRING, b"\xff\xfe"), r"the value of 'k' at byte \d+ is not UTF-8"),
        (value(STRING, b"\xed\xa0\x80"), r"not UTF-8"),
        (value(ARRAY, (STRING, [b"ok", b"\xc3"])), r"not UTF-8"),
        (struct.pack("<I", 13), r"the value of 'k' has the unknown type 13 at byte \d+"),
        (struct.pack("<I", 2**32 - 1), r"unknown type 4294967295"),
        (struct.pack("<IIQ", ARRAY, STRING, 2**61), r"promises 2305843009213693952 strings at byte \d+"),
        (struct.pack("<IIQ", ARRAY, U64, 2**61), r"ends at byte \d+ inside the value of 'k'"),
        (struct.pack("<IIQ", ARRAY, U8, 2**64 - 1), r"ends at byte \d+ inside the value of 'k'"),
        (struct.pack("<IIQ", ARRAY, ARRAY, 1), r"array of the type 9 at byte \d+; expected numbers or strings"),
        (struct.pack("<IIQ", ARRAY, 99, 1), r"array of the type 99"),
        (value(U8, 2)[:0] + struct.pack("<IB", BOOL, 2), r"the value of 'k' at byte \d+ is 2; expected a boolean"),
        (value(ARRAY, (BOOL, [0, 1, 7])), r"array of booleans that holds other bytes"),
    ],
)  # fmt: skip
def test_a_key_that_lies(tmp_path, encoded, message):
    refused(tmp_path, PLAIN.with_key("k", encoded), message)


def test_a_name_that_is_not_utf8_or_endless(tmp_path):
    refused(tmp_path, PLAIN.with_key(b"\xff", value(U32, 1)), r"a key at byte \d+ is not UTF-8")
    refused(
        tmp_path,
        PLAIN.with_key(b"k" * 70000, value(U32, 1)),
        r"a key at byte \d+ claims 70000 bytes; expected at most 65536",
    )
    refused(tmp_path, PLAIN.with_tensor(EMBED, name=b"\xc0\x80"), r"a tensor's name at byte \d+ is not UTF-8")


def test_terminal_escapes_and_line_breaks_in_names_do_not_reach_the_terminal(tmp_path):
    refused(tmp_path, PLAIN.with_tensor(EMBED, name="\x1b[2J\nevil\u202e"), r"token_embd")
    extra = replace(PLAIN, tensors=[*PLAIN.tensors, Tensor("\x1b]0;owned\x07\n", (8,), F32, floats((8,)))])
    refused(tmp_path, extra, r"holds \\x1b\]0;owned\\x07\\n, which a model of these dimensions")
    refused(
        tmp_path,
        PLAIN.with_key("general.architecture", value(STRING, "x\n" * 5000)),
        r"general.architecture is .* \.\.\. ",
    )


@pytest.mark.parametrize(
    ("encoded", "shown"),
    [(value(U32, 0), "0"), (value(U32, 24), "24"), (value(U32, 4), "4"), (value(U32, 2**31), "2147483648"), (value(I32, -32), "-32"),
     (value(STRING, "32"), "'32'"), (value(FLOAT, 32.0), "32.0"), (value(BOOL, 1), "True"), (value(ARRAY, (U32, [32])), r"\[32\]")],
)  # fmt: skip
def test_alignment(tmp_path, encoded, shown):
    refused(
        tmp_path,
        PLAIN.with_key("general.alignment", encoded),
        rf"general.alignment is {shown}; expected a power of two",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_dims": 0}, r"'token_embd.weight' has 0 dimensions; expected 1 to 4"),
        ({"n_dims": 5}, r"'token_embd.weight' has 5 dimensions"),
        ({"n_dims": 2**32 - 1}, r"'token_embd.weight' has 4294967295 dimensions"),
        ({"dims": (64, 0)}, r"'token_embd.weight' has the shape \[0, 64\]; expected positive dimensions"),
        ({"dims": (2**63, 2)}, r"'token_embd.weight' has the shape .* that do not overflow"),
        ({"dims": (2**32, 2**32)}, r"do not overflow"),
        ({"dims": (64, 2**40)}, r"'token_embd.weight' reaches to byte \d+, but the file has|starts at offset"),
        ({"dims": (64, 17)}, r"'blk.0.attn_norm.weight' starts at offset 2048 of the data; expected 2176"),
        ({"dims": (64, 15)}, r"'blk.0.attn_norm.weight' starts at offset 2048 of the data; expected 1920"),
        ({"kind": 6}, r"'token_embd.weight' has the type 6; this release reads F32 \(0\)"),
        ({"kind": 12}, r"'token_embd.weight' has the type 12"),
        ({"kind": 2**32 - 1}, r"'token_embd.weight' has the type 4294967295"),
        ({"dims": (65, 16), "kind": Q8_0}, r"'token_embd.weight' has rows of 65, not a multiple of the Q8_0 block of 32"),
        ({"dims": (64, 16), "kind": TQ2_0}, r"'token_embd.weight' has rows of 64, not a multiple of the TQ2_0 block of 256"),
        ({"offset": 8}, r"'token_embd.weight' starts at offset 8 of the data; expected 0 \(aligned, no gap or overlap\)"),
        ({"offset": 2**64 - 32}, r"'token_embd.weight' starts at offset 18446744073709551584"),
    ],
)  # fmt: skip
def test_a_tensor_that_lies(tmp_path, changes, message):
    refused(tmp_path, PLAIN.with_tensor(EMBED, **changes), message)


@pytest.mark.parametrize(("offset", "kind"), [(0, "overlap"), (2016, "overlap"), (2049, "misaligned"), (2080, "gap")])
def test_overlapping_and_misaligned_tensors(tmp_path, offset, kind):
    refused(
        tmp_path,
        PLAIN.with_tensor("blk.0.attn_norm.weight", offset=offset),
        rf"'blk.0.attn_norm.weight' starts at offset {offset} of the data; expected 2048",
    )


def test_a_tensor_named_twice(tmp_path):
    refused(
        tmp_path,
        replace(PLAIN, tensors=[*PLAIN.tensors, PLAIN.tensors[1]]),
        r"has the tensor 'blk.0.attn_norm.weight' twice",
    )


_SIZES = ["embedding_length", "block_count", "ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank", "ssm.group_count"]  # fmt: skip


@pytest.mark.parametrize("name", _SIZES)
def test_a_dimension_that_is_missing_or_absurd(tmp_path, name):
    key = f"mamba2.{name}"
    refused(tmp_path, PLAIN.with_key(key, None), rf"{key} is None; expected a positive whole number")
    for encoded in (
        value(U32, 0),
        value(I8, -1),
        value(FLOAT, 2.0),
        value(STRING, "64"),
        value(BOOL, 1),
        value(ARRAY, (U32, [64])),
    ):
        refused(tmp_path, PLAIN.with_key(key, encoded), rf"{key} is .*; expected a positive whole number")
    for number in (3, 2**20, 2**31, 2**64 - 1):
        refused(
            tmp_path, PLAIN.with_key(key, value(U64, number)), r"expected|does not fit|cannot be shared|not a multiple"
        )


@pytest.mark.parametrize(
    ("key", "encoded", "message"),
    [
        ("general.architecture", None, r"general.architecture is None; expected 'mamba' or 'mamba2'"),
        ("general.architecture", value(STRING, "rwkv7"), r"general.architecture is 'rwkv7'"),
        ("general.architecture", value(ARRAY, (STRING, ["mamba2"])), r"general.architecture is \['mamba2'\]"),
        ("mamba2.vocab_size", value(U32, 17), r"mamba2.vocab_size is 17, but token_embd.weight has 16 rows"),
        ("mamba2.vocab_size", value(STRING, "16"), r"mamba2.vocab_size is '16'"),
        ("mamba2.ssm.state_size", value(U32, 9), r"blk.0.ssm_in.weight has the shape \[145, 64\]; expected \[147, 64\]"),
        ("mamba2.ssm.conv_kernel", value(U32, 5), r"blk.0.ssm_conv1d.weight has the shape \[80, 4\]; expected \[80, 5\]"),
        ("mamba2.block_count", value(U32, 2), r"has no tensor blk.1.attn_norm.weight"),
        ("mamba2.attention.layer_norm_rms_epsilon", None, r"epsilon is None"),
        ("mamba2.attention.layer_norm_rms_epsilon", value(FLOAT, float("nan")), r"epsilon is nan"),
        ("mamba2.attention.layer_norm_rms_epsilon", value(FLOAT, -1.0), r"epsilon is -1.0"),
        ("mamba2.attention.layer_norm_rms_epsilon", value(DOUBLE, 1e308), r"epsilon is 1e\+308"),
        ("tokenizer.ggml.bos_token_id", value(U32, 16), r"bos_token_id is 16; expected a token id below the vocabulary of 16"),
        ("tokenizer.ggml.eos_token_id", value(U32, 2**32 - 1), r"eos_token_id is 4294967295"),
        ("tokenizer.ggml.eos_token_id", value(I32, -1), r"eos_token_id is -1"),
        ("tokenizer.ggml.bos_token_id", value(BOOL, 1), r"bos_token_id is True"),
        ("tmexport.group_size", value(U32, 128), r"tmexport.group_size is 128, which does not fit"),
        ("tmexport.group_size", value(U32, 0), r"tmexport.group_size is 0, which does not fit"),
        ("tmexport.group_size", value(STRING, "64"), r"tmexport.group_size is '64'"),
    ],
)  # fmt: skip
def test_metadata_that_contradicts(tmp_path, key, encoded, message):
    refused(tmp_path, PLAIN.with_key(key, encoded), message)


@pytest.mark.parametrize("name", [t.name for t in PLAIN.tensors])
def test_a_tensor_that_is_missing_or_misshapen(tmp_path, name):
    without = replace(PLAIN, tensors=[t for t in PLAIN.tensors if t.name != name])
    refused(tmp_path, without, rf"has no (tensor|matrix) {name}")
    if len(PLAIN.tensor(name).dims) == 1:
        flat = PLAIN.with_tensor(name, dims=(*PLAIN.tensor(name).dims, 1))
        refused(tmp_path, flat, rf"{name} has the shape \[1, \d+\]; expected \[\d+\]")


def test_what_is_not_a_file(tmp_path):
    for name, make, message in [
        ("missing", lambda p: None, "No such file"),
        ("folder", os.mkdir, "is not a file"),
        ("pipe", os.mkfifo, "is not a file"),  # opening it would wait for a writer for ever
        ("empty", lambda p: open(p, "w").close(), "has 0 bytes; a GGUF header needs at least 24"),
        ("loop", lambda p: os.symlink(p, p), "cannot be read"),
    ]:
        path = tmp_path / name
        make(path)
        with pytest.raises(GGUFError, match=message):
            open_gguf(path)
    with pytest.raises(GGUFError, match="is not a file"):
        open_gguf("/dev/zero")


def test_a_flipped_bit_in_any_byte_of_the_header_is_refused_or_harmless(tmp_path):
    """No flip may raise anything but our error; `accepts_gguf` lets every other exception through."""
    whole, path = bytearray(PLAIN.build()), tmp_path / "m.gguf"
    accepted = 0
    for at in range(len(PLAIN.header())):
        whole[at] ^= 1 << at % 8
        path.write_bytes(whole)
        accepted += accepts_gguf(path)
        whole[at] ^= 1 << at % 8
    assert 0 < accepted < at // 2  # letters of keys that are not needed may change


@pytest.mark.parametrize(
    "padding",
    [
        value(ARRAY, (U8, bytes(1_000_000))),
        value(ARRAY, (I32, [10**6] * 250_000)),
        struct.pack("<IIQ", ARRAY, STRING, 60_000) + bytes(8 * 60_000),
        value(ARRAY, (STRING, ["ab"] * 50_000)),
        value(STRING, "x" * 1_000_000),
    ],
    ids=["bytes", "numbers", "empty strings", "strings", "one string"],
)  # fmt: skip
def test_opening_takes_less_memory_than_the_file(tmp_path, padding):
    path = tmp_path / "m.gguf"
    path.write_bytes(PLAIN.with_key("k", padding).build())
    assert peak_bytes(lambda: open_gguf(path)) < 1.1 * path.stat().st_size + 2**16


def test_many_tiny_keys_and_tensors_take_bounded_memory(tmp_path):
    path = tmp_path / "m.gguf"
    keys = {f"{i:x}": value(U8, 0) for i in range(4096)}
    tensors = [Tensor(f"{i:x}", (1,), F32, bytes(4)) for i in range(16384)]
    path.write_bytes(Gguf(keys, tensors).build())
    assert peak_bytes(lambda: open_gguf(path)) < 16 * 2**20
    too_many = Gguf({f"{i:x}": value(U8, 0) for i in range(4097)}, [])
    refused(tmp_path, too_many, r"has 0 tensors and 4097 keys; expected at most 16384 and 4096")
    refused(tmp_path, Gguf({}, [*tensors, Tensor("x", (1,), F32, bytes(4))]), r"has 16385 tensors")
