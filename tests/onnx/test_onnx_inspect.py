"""`tmexport inspect` of an .onnx file: what it says is what the checkpoint holds and what lies on the disk."""

import json

import numpy as np
import onnx
import pytest

from tests.onnx.exporting import FORMS, run


@pytest.mark.parametrize("form", FORMS)
def test_what_is_in_a_file(tied, files, form):
    path = files[form, "q8"]
    shown = json.loads(run("inspect", path, "--json").stdout)
    assert (shown["format"], shown["group_size"], shown["bytes"]) == ("ONNX", 64, path.stat().st_size)
    assert shown["config"]["d_model"] == tied.config.d_model
    about = shown["onnx"]
    assert (about["form"], about["embedding_type"], about["logits"]) == (form, "q8", "all")
    assert about["opset"]["ai.onnx"] == (23 if form == "ort" else 15)
    assert len(about["functions"]) == (4 if form == "custom" else 0)
    assert ("tmexport.TernaryMatMul" in about["functions"]) == (form == "custom")
    tensors = {tensor["name"]: tensor for tensor in shown["tensors"]}
    for i in range(tied.config.n_layer):
        for which in ("in_proj", "out_proj"):
            name = f"backbone.layers.{i}.mixer.{which}.weight"
            codes = tied.codes(name).codes
            assert tensors[name]["shape"] == list(codes.shape)
            assert tensors[name]["zero_ratio"] == pytest.approx(np.mean(codes == 0), abs=1e-12)
            assert tensors[name]["bytes"] == codes.size // 4 + codes.size // 64 * (4 if form == "ort" else 2)
    weights = onnx.load(path).graph.initializer
    assert sum(tensor["bytes"] for tensor in shown["tensors"]) == sum(len(weight.raw_data) for weight in weights)
    assert shown["parameters"] == sum(np.array(tied.dense(name)).size for name in tied.names)
    text = run("inspect", path).stdout
    assert f"form {form}, embedding q8_0, logits all" in text


def test_what_is_not_ours_is_one_clear_line(files, tmp_path):
    path = tmp_path / "m.onnx"

    def refused(words):
        result = run("inspect", path, "--json")
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1), result.output
        assert words in result.stderr

    refused("no such file")
    path.write_bytes(b"\xff" * 100)
    refused("is not a readable ONNX file")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "another", [], [])), path)
    refused("has no tmexport metadata; expected a file written by `tmexport onnx`")
    model = onnx.load(files["ort", "q8"])
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "backbone.norm_f.weight"))
    onnx.save(model, path)
    refused("has no backbone.norm_f.weight")
