"""A model that would pass protobuf's limit: its weights in a second file, read by everything that reads the first."""

import json
import os

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from runtime_ref.generate import generate
from runtime_ref.ort import OrtModel
from tests.onnx.exporting import FORMS, TIED, export, feed, run, token_ids
from tests.onnx.test_onnx_graph import check_whole
from tmexport.errors import TmexportError
from tmexport.onnx import writer
from tmexport.onnx.names import OnnxError

LIMIT = 100_000


@pytest.fixture
def small_limit(monkeypatch):
    """As if protobuf could hold 100 kB: the test's models then are too large."""
    monkeypatch.setattr(writer, "LARGEST_FILE", LIMIT)


@pytest.fixture
def split(tied, tmp_path, small_limit):
    return export(tied, tmp_path / "m.onnx", "ort")


@pytest.mark.parametrize("form", FORMS)
def test_two_files_are_the_same_model(tied, files, tmp_path, small_limit, form):
    report = json.loads(run("onnx", tied.path, tmp_path / "m.onnx", "--ops", form, "--json").stdout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.config.json", "m.onnx", "m.onnx.data", "m.tokenizer.json"]
    sizes = [(tmp_path / name).stat().st_size for name in ("m.onnx", "m.onnx.data")]
    assert sizes[0] < LIMIT
    assert report["bytes"] == sum(sizes)
    assert str(tmp_path / "m.onnx.data") in report["files"]
    check_whole(tmp_path / "m.onnx")
    one, two = (
        onnx.load(path).graph.initializer for path in (files[form, "q8"], tmp_path / "m.onnx")
    )  # onnx's own reader
    assert [(t.name, t.dims, t.raw_data) for t in one] == [(t.name, t.dims, t.raw_data) for t in two]
    ids = token_ids(TIED, 1, 9)
    want = feed(ort.InferenceSession(files[form, "q8"]), TIED, ids)
    assert np.array_equal(feed(ort.InferenceSession(tmp_path / "m.onnx"), TIED, ids), want)
    if form != "ort":
        assert np.abs(feed(ReferenceEvaluator(str(tmp_path / "m.onnx")), TIED, ids) - want).max() < 1e-4


def test_every_reader_reads_it(tied, files, split):
    assert run("verify", tied.path, split).exit_code == 0
    one, two = (json.loads(run("inspect", path, "--json").stdout) for path in (files["ort", "q8"], split))
    assert two["onnx"].pop("files") == [str(split), f"{split}.data"]
    assert two["bytes"] == sum(p.stat().st_size for p in (split, split.with_name("m.onnx.data")))
    assert [(t["name"], t["bytes"], t["zero_ratio"]) for t in one["tensors"]] == [
        (t["name"], t["bytes"], t["zero_ratio"]) for t in two["tensors"]
    ]
    tokens = [list(OrtModel.load(path, threads=1).generate([1, 2, 3], 5)) for path in (files["ort", "q8"], split)]
    assert tokens[0] == tokens[1]
    assert run(split, "--prompt", "import", "-n", 3, command=generate).exit_code == 0


def test_a_renamed_model_still_finds_its_data(tied, split):
    split.rename(split.with_name("n.onnx"))
    split.with_name("m.tokenizer.json").rename(split.with_name("n.tokenizer.json"))
    assert run("verify", tied.path, split.with_name("n.onnx")).exit_code == 0
    assert OrtModel.load(split.with_name("n.onnx"), threads=1)


def test_a_flipped_bit_in_the_data_file_is_named(tied, split):
    name = "backbone.layers.1.mixer.in_proj.weight"
    tensor = next(t for t in onnx.load(split, load_external_data=False).graph.initializer if t.name == f"{name}.codes")
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    data = bytearray(split.with_name("m.onnx.data").read_bytes())
    data[offset + (5 * 256 + 77) // 4] ^= 1 << 2 * (77 % 4)
    split.with_name("m.onnx.data").write_bytes(data)
    assert f"{name}, row 5, group 1: expected code" in run("verify", tied.path, split).stderr


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 10_000)])
def test_a_data_file_that_is_missing_or_short_is_one_line(tied, split, damage):
    damage(split.with_name("m.onnx.data"))
    for arguments in (("verify", tied.path, split), ("inspect", split)):
        result = run(*arguments)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
        assert "m.onnx.data" in result.stderr
    with pytest.raises(OnnxError, match="cannot load it"):
        OrtModel.load(split)


def test_an_error_on_the_way_leaves_the_old_pair(tied, split):
    """The last weight fails: neither file was renamed."""
    from tmexport.onnx.builder import Initializer
    from tmexport.onnx.graph import build_graph

    before = {path.name: path.read_bytes() for path in split.parent.iterdir()}
    graph = build_graph(tied, "portable")

    def fails():
        raise TmexportError("no")

    graph.initializers.append(Initializer("last", np.dtype("<f4"), (1000,), fails))
    with pytest.raises(TmexportError, match="no"):
        writer.write_model(split, graph)
    assert {path.name: path.read_bytes() for path in split.parent.iterdir()} == before


def test_a_crash_between_the_two_renames_leaves_no_model_with_other_weights(tied, split, monkeypatch):
    real = os.replace

    def crash(source, target):
        if str(target).endswith(".onnx"):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        export(tied, split, "ort", "f32")
    assert not split.exists()
    assert [p.name for p in split.parent.iterdir() if p.name.endswith(".tmp")] == []
