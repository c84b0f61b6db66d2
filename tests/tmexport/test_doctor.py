"""Files made by hand: every kind of fault, other projects' types, and the one lossless transcode."""

import json
import struct

import numpy as np
import pytest

from tests.commands import invoke
from tests.models import write_small
from tmexport.cli.doctor import doctor
from tmexport.doctor import diagnose
from tmexport.gguf.reader import open_gguf
from tmexport.types import GGMLType, decode_codes

CODES = np.random.default_rng(3).integers(0, 3, (6, 384)).astype(np.uint8)
SCALES = np.random.default_rng(4).uniform(0.5, 2, (6, 3)).astype(np.float16)
MERGES = {"tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 0}
VOCABULARY = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
KEYS = {"general.architecture": "gemma"} | VOCABULARY | MERGES


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, value):
    if isinstance(value, int):
        return text(name) + struct.pack("<II", 4, value)
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    return text(name) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def blocks_of_128():
    """Codes in order, lowest bits first, after the scale: the layout that PrismML's model cards give."""
    packed = (CODES.reshape(6, 3, 32, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(-1).astype(np.uint8)
    return np.concatenate([SCALES[..., None].view(np.uint8), packed], axis=2).tobytes()


def file(path, keys=KEYS, tensors=(("w", (384, 6), 42, None),), data=None, move=0, cut=0):
    data = blocks_of_128() if data is None else data
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(keys)) + b"".join(key(k, v) for k, v in keys.items())
    for name, shape, kind, _ in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, move)
    body = head.ljust(-(-len(head) // 32) * 32, b"\0") + b"\0" * move + data
    path.write_bytes(body[: len(body) - cut])
    return path


def test_blocks_of_128_are_named_and_mended_without_loss(tmp_path):
    path = file(tmp_path / "theirs.gguf")
    found = invoke(doctor, path, "--json")
    report = json.loads(found.stdout)
    assert (found.exit_code, report["variant"], report["loads"]) == (1, "Q2_0 of 128", ["PrismML's llama.cpp"])
    assert "blocks of 64" in report["fix"]
    fixed = invoke(doctor, path, "--fix", tmp_path / "stock.gguf")
    assert (fixed.exit_code, "1 tensors in stock types" in fixed.stdout) == (0, True)
    gguf = open_gguf(tmp_path / "stock.gguf")
    codes, scales = decode_codes(gguf.blocks("w"), GGMLType.Q2_0, 384, "w")
    assert np.array_equal(codes, CODES.astype(np.int8) - 1)
    assert np.array_equal(np.asarray(scales), np.repeat(SCALES, 2, axis=1))
    assert gguf.metadata["tokenizer.ggml.tokens"] == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "name", "loads"),
    [(36, "I2_S", "bitnet.cpp"), (134, "IQ1_BN", "ik_llama.cpp"), (135, "IQ2_BN", "ik_llama.cpp"), (335, "IQ2_BN_R4", "ik_llama.cpp"),
     (142, "id 142", "PrismML"), (143, "id 143", "PrismML"), (9999, "id 9999", "an unknown program")],
)  # fmt: skip
def test_other_projects_types_are_named(tmp_path, kind, name, loads):
    found = diagnose(file(tmp_path / "f.gguf", tensors=(("w", (384, 6), kind, None),)))
    assert (found.types, found.fix) == ({name: 1}, None)
    assert loads in found.problems[0]
    assert invoke(doctor, tmp_path / "f.gguf", "--fix", tmp_path / "out.gguf").exit_code == 1
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"cut": 40}, "truncated"),
        ({"move": 8}, "not aligned to 32"),
        ({"move": 64}, "a gap or an overlap"),
        ({"keys": KEYS | {"general.alignment": 24}}, "alignment is 24"),
        ({"keys": {k: v for k, v in KEYS.items() if k != "general.architecture"}}, "has no general.architecture"),
        ({"keys": {"general.architecture": "llama"}}, "has no tokenizer.ggml.model"),
        ({"keys": KEYS | {"tokenizer.ggml.pre": "default"}}, "does not say how text is split"),
        ({"keys": {k: v for k, v in KEYS.items() if "eos" not in k}}, "takes the token 11"),
        ({"keys": KEYS | {"tokenizer.ggml.tokens": ["a", "a"]}}, "has a token twice"),
        ({"keys": KEYS | {"tokenizer.ggml.bos_token_id": 7}}, "bos_token_id is 7, but there are 2 tokens"),
        ({"tensors": (("token_embd.weight", (32, 12), 0, None),), "data": bytes(12 * 128)}, "has 12 rows"),
        ({"tensors": (("w", (100, 6), 34, None),)}, "no multiple of the TQ1_0 block of 256"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, options, sentence):
    options = {"tensors": (("w", (32, 6), 0, None),), "data": bytes(768)} | options
    found = invoke(doctor, file(tmp_path / "f.gguf", **options))
    assert (found.exit_code, sentence in found.stdout) == (1, True), found.stdout


def test_exit_codes(tmp_path):
    good = file(tmp_path / "good.gguf", tensors=(("w", (32, 6), 0, None),), data=bytes(768))
    assert invoke(doctor, good).exit_code == 0
    assert invoke(doctor, tmp_path / "none.gguf").exit_code == 2
    (tmp_path / "text.gguf").write_text("hello")
    assert invoke(doctor, tmp_path / "text.gguf").exit_code == 1
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert invoke(doctor, tmp_path / "empty.gguf").exit_code == 1


def test_our_own_file_is_fine(tmp_path):
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.export import plan_export

    write_small(tmp_path / "ckpt", group_size=64)
    plan_export(open_checkpoint(tmp_path / "ckpt")).write(tmp_path / "m.gguf", lambda tensor: None)
    found = diagnose(tmp_path / "m.gguf")
    assert (found.problems, found.variant, found.loads) == ([], "Q2_0", ["stock llama.cpp", "tmexport, runtime_ref"])


@pytest.mark.parametrize("count", [65536, 2**32 - 1])
def test_more_parts_than_a_model_can_have(tmp_path, count):
    found = diagnose(file(tmp_path / "m.gguf", KEYS | {"split.count": count, "split.no": 0}))
    assert f"split.count is {count}; expected at most 65535" in found.problems
    assert not any("beside it" in problem for problem in found.problems)


def test_a_part_whose_neighbours_name_is_too_long(tmp_path):
    """255 bytes are a name's most; the part's own number and count add 20."""
    found = diagnose(file(tmp_path / ("m" * 245 + ".gguf"), KEYS | {"split.count": 65535, "split.no": 0}))
    assert [problem[-17:] for problem in found.problems if "split model" in problem] == [" is not beside it"]
