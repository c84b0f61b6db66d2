"""ONNX files from strangers: `verify` refuses or names a difference, whatever was done to the bytes; no other error comes out."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import onnx
import pytest

from tests.hostile.builders import CONFIG, checkpoint
from tests.hostile.mutate import mutate
from tests.hostile.targets import peak_bytes
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TmexportError
from tmexport.onnx.export import export_onnx
from tmexport.onnx.graph import build_graph
from tmexport.onnx.names import OnnxError
from tmexport.onnx.verify import load_onnx, verify_onnx

IN = "backbone.layers.0.mixer.in_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_checkpoint(checkpoint(tmp_path_factory.mktemp("onnx")))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "m.onnx"
    export_onnx(path, build_graph(source, "portable", "f16"), None)
    return path.read_bytes()


def outcome(source, path) -> str:
    try:
        report = verify_onnx(source, path)
    except TmexportError as error:
        return "refused" if str(error).isprintable() else "unprintable"
    return "equal" if report.difference is None else "different"


def test_the_unbroken_file_is_equal(source, whole, tmp_path):
    (tmp_path / "m.onnx").write_bytes(whole)
    assert outcome(source, tmp_path / "m.onnx") == "equal"


def test_truncated_anywhere(source, whole, tmp_path):
    path = tmp_path / "m.onnx"
    for end in [*range(0, 200, 10), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert outcome(source, path) in ("refused", "different")


def test_random_damage(source, whole, tmp_path):
    path, rng, outcomes = tmp_path / "m.onnx", random.Random(0), []
    words = [
        b"MatMulNBits",
        b"com.microsoft",
        b"tmexport",
        b"../../etc/passwd",
        b"location",
        b"\xff\xff\xff\xff\x0f",
        b"\x80" * 10,
    ]
    for _ in range(200):
        path.write_bytes(mutate(whole, rng, words))
        outcomes.append(outcome(source, path))
    assert outcomes.count("refused") > 20
    assert outcomes.count("different") > 20


def test_a_flipped_bit_in_a_weight_is_named(source, whole, tmp_path):
    path, rng = tmp_path / "m.onnx", random.Random(0)
    for index, tensor in enumerate(onnx.load_from_string(whole).graph.initializer):
        if tensor.name.startswith("const_"):
            continue
        parsed = onnx.load_from_string(whole)
        damaged = bytearray(tensor.raw_data)
        damaged[rng.randrange(len(damaged))] ^= 0x10
        parsed.graph.initializer[index].raw_data = bytes(damaged)
        path.write_bytes(parsed.SerializeToString())
        difference = verify_onnx(source, path).difference
        assert difference is not None
        assert tensor.name.startswith(difference.tensor), difference


def changed(whole: bytes, change) -> bytes:
    parsed = onnx.load_from_string(whole)
    change(parsed)
    return parsed.SerializeToString()


def weight(parsed, name):
    return next(t for t in parsed.graph.initializer if t.name == name)


def _external(location, offset=0, length=145 * 16):
    def change(parsed):
        tensor = weight(parsed, f"{IN}.codes")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))

    return change


def _metadata(key, value):
    def change(parsed):
        for entry in parsed.metadata_props:
            if entry.key == key:
                entry.value = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_external("../../../../etc/passwd"), rf"{IN}.codes lies in '../../../../etc/passwd'; expected a file beside the model"),
        (_external("/etc/passwd"), "expected a file beside the model"),
        (_external(".."), "expected a file beside the model"),
        (_external("none.data"), "none.data: no such file"),
        (_external("link.data"), "is a link that leaves the folder"),
        (_external("m.onnx", offset=2**40), "expected 2320 within its"),
        (_external("m.onnx", offset=-1), "expected 2320 within its"),
        (_external("m.onnx", length=10**12), "is 1000000000000 bytes at 0 of m.onnx; expected 2320 within its"),
        (_external("m.onnx", offset="x"), "is damaged"),
        (lambda m: m.ClearField("metadata_props"), "has no tmexport metadata"),
        (_metadata("tmexport.version", "3"), "format version '3'; this release reads 1 and 2; install a newer tmexport"),
        (_metadata("tmexport.config", "{"), "the tmexport metadata is damaged"),
        (_metadata("tmexport.config", "[" * 100_000), "the tmexport metadata is damaged"),
        (_metadata("tmexport.config", json.dumps(CONFIG | {"num_hidden_layers": 10**9})), "n_layer is 1000000000"),
        (_metadata("tmexport.config", "9" * 5000), "the tmexport metadata is damaged"),
        (_metadata("tmexport.group_size", "sixty"), "the tmexport metadata is damaged"),
        (_metadata("tmexport.form", "../x\x1b[2J"), r"form is '../x\\x1b\[2J'"),
        (lambda m: setattr(weight(m, f"{IN}.codes"), "data_type", 99), "is damaged|expected u1"),
        (lambda m: weight(m, f"{IN}.codes").ClearField("raw_data"), "is damaged|expected u1"),
    ],
    ids=range(19),
)  # fmt: skip
def test_a_file_that_lies(source, whole, tmp_path, change, message):
    (tmp_path / "m.onnx").write_bytes(changed(whole, change))
    (tmp_path / "link.data").symlink_to("/etc/passwd")
    with pytest.raises(TmexportError, match=message) as caught:
        verify_onnx(source, tmp_path / "m.onnx")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dimension", [-1, 0, 1, 2**62, -(2**63)])
def test_dimensions_that_are_not_the_writers(source, whole, tmp_path, dimension):
    """-1 means "whatever is left" to numpy: such a file once was called equal."""
    damaged = changed(whole, lambda m: weight(m, f"{IN}.scales").dims.__setitem__(0, dimension))
    (tmp_path / "m.onnx").write_bytes(damaged)
    difference = verify_onnx(source, tmp_path / "m.onnx").difference
    assert str(difference) == f"{IN}.scales: expected the shape [145, 1], found [{dimension}, 1]"


@pytest.mark.parametrize("bits", [0x7E00, 0x8001, 0x7C00])
def test_scales_that_are_no_scales_differ(source, whole, tmp_path, bits):
    def change(parsed):
        tensor = weight(parsed, f"{IN}.scales")
        tensor.raw_data = np.uint16(bits).tobytes() + tensor.raw_data[2:]

    (tmp_path / "m.onnx").write_bytes(changed(whole, change))
    difference = verify_onnx(source, tmp_path / "m.onnx").difference
    assert (difference.tensor, difference.row, difference.group) == (IN, 0, 0)


def test_what_is_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OnnxError, match="no such file; expected a file written by `tmexport onnx`"):
            load_onnx(path)


def test_reading_takes_little_more_than_the_file(whole, tmp_path):
    (tmp_path / "m.onnx").write_bytes(whole)
    load_onnx(tmp_path / "m.onnx")
    assert peak_bytes(lambda: load_onnx(tmp_path / "m.onnx")) < 4 * len(whole) + 2**20


def test_the_same_checkpoint_gives_the_same_bytes(source, whole, tmp_path):
    export_onnx(tmp_path / "m.onnx", build_graph(source, "portable", "f16"), None)
    assert (tmp_path / "m.onnx").read_bytes() == whole
