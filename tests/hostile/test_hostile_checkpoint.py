"""Broken and malicious checkpoint folders: weights, shard indexes, links, pickles."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.hostile.builders import (
    CONFIG,
    checkpoint,
    dense_arrays,
    dense_config,
    safetensors_file,
    safetensors_header,
    ternary_arrays,
)
from tests.hostile.targets import peak_bytes, read_checkpoint
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TmexportError

EMBED, IN = "backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight"


def refused(folder: Path, message: str) -> None:
    with pytest.raises(TmexportError, match=message) as caught:
        read_checkpoint(folder)
    assert str(caught.value).isprintable()


def with_header(folder: Path, change, data: bytes | None = None) -> Path:
    """The ternary checkpoint with a header that `change` edited in place."""
    header, valid = safetensors_header(ternary_arrays())
    change(header)
    checkpoint(folder)
    (folder / "model.safetensors").write_bytes(safetensors_file(header, valid if data is None else data))
    return folder


def test_the_unbroken_folders_are_read(tmp_path):
    read_checkpoint(checkpoint(tmp_path / "ternary"))
    read_checkpoint(checkpoint(tmp_path / "dense", dense_config(), dense_arrays()))
    assert open_checkpoint(tmp_path / "ternary").group_size == 64


def test_safetensors_truncated_anywhere(tmp_path):
    folder = checkpoint(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    for end in [*range(0, 8 + length, 7), *range(8 + length, len(whole), 499), len(whole) - 1]:
        file.write_bytes(whole[:end])
        refused(folder, rf"{file}: (is not a valid safetensors file|claims)")


@pytest.mark.parametrize(
    ("length", "message"),
    [(2**63, "claims a header of 9223372036854775808 bytes; expected at most 4194304"), (2**64 - 1, "claims a header"),
     (2**22 + 1, "claims a header of 4194305 bytes"), (0, "is not a valid safetensors file"), (2**22, "is not a valid safetensors file")],
)  # fmt: skip
def test_a_header_length_that_lies(tmp_path, length, message):
    folder = checkpoint(tmp_path)
    header, data = safetensors_header(ternary_arrays())
    (folder / "model.safetensors").write_bytes(safetensors_file(header, data, length))
    assert peak_bytes(lambda: refused(folder, message)) < 2**20


def _set(name: str, key: str, value: object):
    def change(header):
        header[name][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(EMBED, "data_offsets", [0, 2**63]), "not a valid safetensors"),
        (_set(EMBED, "data_offsets", [4096, 0]), "not a valid safetensors"),
        (_set(EMBED, "data_offsets", [-1, 4096]), "not a valid safetensors"),
        (_set(EMBED, "data_offsets", [32, 4128]), "not a valid safetensors"),
        (_set("backbone.layers.0.norm.weight", "data_offsets", [0, 256]), "not a valid safetensors"),
        (_set(EMBED, "shape", [2**62, 64]), "not a valid safetensors"),
        (_set(EMBED, "shape", [-16, -64]), "not a valid safetensors"),
        (_set(EMBED, "shape", [64, 16]), rf"{EMBED} is F32 \[64, 16\]; expected F32 or F16 or BF16 \[16, 64\]"),
        (_set(EMBED, "shape", "16"), "not a valid safetensors"),
        (_set(EMBED, "dtype", "F128"), "not a valid safetensors"),
        (_set(EMBED, "dtype", "I32"), rf"{EMBED} is I32 \[16, 64\]; expected F32"),
        (_set(EMBED, "dtype", "F8_E4M3"), "not a valid safetensors"),
        (_set(IN + ".codes", "dtype", "I8"), rf"{IN}.codes is I8 \[145, 16\]; expected U8"),
        (_set(IN + ".scales", "dtype", "BF16"), rf"{IN}.scales is BF16 \[145, 1\]; expected F16"),
        (lambda h: h.pop(EMBED), "not a valid safetensors"),
        (lambda h: h.clear(), "not a valid safetensors"),
        (lambda h: h.update({"\x1b[2J\n": h.pop(EMBED)}), rf"{EMBED} is missing"),
    ],
)  # fmt: skip
def test_a_header_that_lies(tmp_path, change, message):
    refused(with_header(tmp_path, change), message)


def test_two_tensors_of_one_name(tmp_path):
    folder = checkpoint(tmp_path)
    header, data = safetensors_header(ternary_arrays())
    twice = json.dumps(header)[:-1] + f', "{EMBED}": {json.dumps(header[EMBED])}' + "}"
    (folder / "model.safetensors").write_bytes(safetensors_file(twice.encode(), data))
    # The same entry twice is one entry, to Rust as to Python; another place for it leaves a hole.
    moved = twice.replace("[0, 4096]", "[4096, 8192]", 1)
    (folder / "model.safetensors").write_bytes(safetensors_file(moved.encode(), data + bytes(4096)))
    refused(folder, "not a valid safetensors")


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000, b"null", b"[]", b"3", b'{"a": 1}'])
def test_a_header_that_is_not_a_header(tmp_path, text):
    folder = checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(safetensors_file(text, b""))
    refused(folder, "not a valid safetensors")


@pytest.mark.parametrize("extra", ["lm_head.weight.extra", "backbone.layers.1.norm.weight", IN])
def test_a_tensor_too_many(tmp_path, extra):
    folder = checkpoint(tmp_path, arrays=ternary_arrays() | {extra: np.zeros(3, np.float32)})
    refused(folder, rf"holds {extra}, which a model of these dimensions does not have")


@pytest.mark.parametrize("name", list(ternary_arrays()))
def test_a_tensor_too_few(tmp_path, name):
    folder = checkpoint(tmp_path, arrays={k: v for k, v in ternary_arrays().items() if k != name})
    refused(folder, rf"{name} is missing; expected shape")


@pytest.mark.parametrize("byte", [0xFF, 0x03, 0xC0, 0x0C])
def test_the_2_bit_code_3(tmp_path, byte):
    arrays = ternary_arrays()
    arrays[IN + ".codes"][17, 3] = byte
    column = {0xFF: 12, 0x03: 12, 0xC0: 15, 0x0C: 13}[byte]
    refused(checkpoint(tmp_path, arrays=arrays), rf"{IN}: row 17, column {column} holds the 2-bit value 3")


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00, 0x8000, 0x0001, 0x03FF, 0xBC00], ids=["NaN", "inf", "-inf", "-0", "subnormal", "largest subnormal", "-1"])  # fmt: skip
def test_scales_that_are_no_scales(tmp_path, bits):
    arrays = ternary_arrays()
    arrays[IN + ".scales"].view(np.uint16)[9, 0] = bits
    refused(
        checkpoint(tmp_path, arrays=arrays),
        rf"{IN}: row 9, group 0 has the scale .*; expected \+0 or a positive normal fp16",
    )


def test_codes_without_a_scale(tmp_path):
    arrays = ternary_arrays()
    arrays[IN + ".scales"][9, 0] = 0
    refused(checkpoint(tmp_path, arrays=arrays), rf"{IN}: row 9, group 0 has non-zero codes but the scale 0")


def test_a_tied_head_that_differs(tmp_path):
    arrays = dense_arrays() | {"lm_head.weight": np.zeros((16, 64), np.float32)}
    refused(checkpoint(tmp_path, dense_config(), arrays), "ties the head to the embedding, but lm_head.weight differs")
    arrays["lm_head.weight"] = np.zeros((2, 2), np.float32)
    refused(checkpoint(tmp_path, dense_config(), arrays), "lm_head.weight differs")


# --- where files may lie ---------------------------------------------------------------------------------------------


def sharded(folder: Path, names: dict[str, str] | None = None, first: str = "a.safetensors") -> Path:
    """Two shards and their index; `names` overrides entries of the weight_map."""
    arrays = dense_arrays()
    parts = {first: list(arrays)[:5], "b.safetensors": list(arrays)[5:]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dense_config()))
    weight_map = {}
    for shard, members in parts.items():
        part = {name: arrays[name] for name in members}
        (folder / Path(shard).name).write_bytes(safetensors_file(*safetensors_header(part)))
        weight_map |= dict.fromkeys(members, shard)
    weight_map |= names or {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_unbroken_shards_are_read(tmp_path):
    read_checkpoint(sharded(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/etc/passwd", "x/../a.safetensors", "sub/a.safetensors", ".", "..", ".hidden", "", "a\0b", "~/x", "C:\\x",
     "a" * 300, 7, None, ["a.safetensors"], {"a": 1}, True],
)  # fmt: skip
def test_a_shard_index_that_leads_elsewhere(tmp_path, name):
    outside = sharded(tmp_path)
    folder = tmp_path / "inner"
    sharded(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][EMBED] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert outside.exists()
    refused(
        folder, "expected a plain file name in the same folder|is not a shard index|no such file|not a regular file"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a shard index"), ("[]", "is not a shard index"), ("{}", "is not a shard index"), ('{"weight_map": []}', "is not a shard index"),
        ('{"weight_map": {}}', "is missing"), ("[" * 100_000, "is not a shard index"), ("\ufeff{}", "is not a shard index"),
        ('{"weight_map": {"x": "a.safetensors"}}', "x is listed but in no shard"),
        (" " * (2**22 + 1), "has 4194305 bytes; expected at most 4194304"),
    ],
)  # fmt: skip
def test_a_shard_index_that_is_none(tmp_path, text, message):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, message)


def test_shards_that_contradict_each_other(tmp_path):
    refused(
        sharded(tmp_path / "moved", {EMBED: "b.safetensors"}),
        rf"{EMBED} is in a.safetensors, but the index or another shard has it as well",
    )
    folder = sharded(tmp_path / "twice")
    (folder / "b.safetensors").write_bytes(safetensors_file(*safetensors_header(dense_arrays())))
    refused(folder, "expected one place")
    refused(sharded(tmp_path / "listed", {"more.weight": "a.safetensors"}), "more.weight is listed but in no shard")


@pytest.mark.parametrize("name", ["a.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_link_that_leaves_the_folder(tmp_path, name):
    folder, elsewhere = sharded(tmp_path / "ckpt"), tmp_path / "secret"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    refused(folder, rf"{name}: is a link that leaves the folder, to {elsewhere}; put the file itself there")
    (folder / name).unlink()
    (folder / name).symlink_to("../secret")
    refused(folder, "is a link that leaves the folder")
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nothing")
    refused(folder, "no such file")
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    refused(folder, "no such file")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_weights_and_tokenizer_are_no_links_out_either(tmp_path, name):
    folder = checkpoint(tmp_path / "ckpt")
    (tmp_path / "x").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "x")
    refused(folder, "is a link that leaves the folder")


def test_a_link_inside_the_folder_and_a_linked_folder_are_followed(tmp_path):
    folder = sharded(tmp_path / "ckpt")
    (folder / "a.safetensors").rename(folder / "real")
    (folder / "a.safetensors").symlink_to("real")
    (tmp_path / "link").symlink_to(folder)
    read_checkpoint(tmp_path / "link")


def test_hugging_faces_cache_is_read(tmp_path):
    """hub/models--x--y/snapshots/<revision>/<file> -> ../../blobs/<hash>, as huggingface_hub lays it out."""
    repository = tmp_path / "models--x--y"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    sharded(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    read_checkpoint(snapshot)
    for folder in (repository, repository / "snapshots" / ".."):
        refused(folder, "its snapshots/ holds the checkpoints, a folder a revision")
    (snapshot / "sub").mkdir()
    for file in list(snapshot.iterdir()):
        if file.is_symlink():
            (snapshot / "sub" / file.name).symlink_to(f"../{file.readlink()}")
    read_checkpoint(snapshot / "sub")
    (snapshot / "a.safetensors").unlink()
    (snapshot / "a.safetensors").symlink_to("../../../secret")
    (tmp_path / "secret").write_bytes(b"")
    refused(snapshot, "is a link that leaves the folder")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_not_a_file(tmp_path, name, kind):
    folder = checkpoint(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)  # opening a pipe would wait for ever
    refused(folder, rf"{name}: is not a regular file")


def test_what_is_not_a_folder(tmp_path):
    refused(tmp_path / "missing", "no such folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file; expected a checkpoint folder")
    refused(tmp_path, "config.json: no such file; expected a checkpoint folder")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "holds no weights; expected model.safetensors or pytorch_model.bin")
