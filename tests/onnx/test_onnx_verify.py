"""`verify` on files that are right, subtly wrong, damaged, or not ours. Every change is made with onnx itself."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.models import ternary_tensors
from tests.onnx.exporting import EMBEDDINGS, FORMS, export, run, write_ternary
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.model import mamba2_model
from tmexport.onnx.verify import verify_onnx
from tmexport.types.ternary import TernaryTensor

IN_PROJ = "backbone.layers.1.mixer.in_proj.weight"


def initializer(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def independent_codes(model, name, shape):
    """Codes and fp32 scales read with numpy alone: eight bits a byte, lowest first, two a code, minus one."""
    raw = numpy_helper.to_array(initializer(model, name + ".codes")).reshape(shape[0], -1)
    bits = np.unpackbits(raw, axis=1, bitorder="little").reshape(*shape, 2)
    scales = numpy_helper.to_array(initializer(model, name + ".scales")).astype(np.float32)
    return (bits[:, :, 0] + 2 * bits[:, :, 1]).astype(np.int8) - 1, scales


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_codes_and_scales_are_the_checkpoints_bit_for_bit(tmp_path, form, group_size):
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=128, d_state=16)
    checkpoint = write_ternary(tmp_path / "ckpt", config, group_size)
    model = onnx.load(export(checkpoint, tmp_path / "m.onnx", form))
    for which in ("in_proj", "out_proj"):
        name = f"backbone.layers.0.mixer.{which}.weight"
        tensor: TernaryTensor = checkpoint.codes(name)
        codes, scales = independent_codes(model, name, tensor.shape)
        assert np.array_equal(codes, tensor.codes)
        repeat = scales.shape[1] // tensor.scales.shape[1]
        assert repeat == (2 if form == "ort" and group_size == 256 else 1)
        assert np.array_equal(scales, np.repeat(tensor.scales, repeat, axis=1).astype(np.float32))
    assert run("verify", checkpoint.path, tmp_path / "m.onnx").exit_code == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_a_good_file_is_equal(tied, files, form, embedding):
    result = run("verify", tied.path, files[form, embedding], "--json")
    report = json.loads(result.stdout)
    projections = 2 * (256 * (2 * 512 + 64 + 16) + 256 * 512)
    assert (result.exit_code, report["equal"], report["codes"]) == (0, True, projections)
    assert report["ternary_tensors"] == 4


def flip_code(model):
    tensor = initializer(model, IN_PROJ + ".codes")
    raw = bytearray(tensor.raw_data)
    k = 256
    raw[(5 * k + 77) // 4] ^= 1 << 2 * (77 % 4)  # row 5, column 77
    tensor.raw_data = bytes(raw)
    return f"{IN_PROJ}, row 5, group 1: expected code"


def flip_scale(model):
    tensor = initializer(model, IN_PROJ + ".scales")
    values = numpy_helper.to_array(tensor).copy()
    values[7, 2] = np.nextafter(values[7, 2], np.inf, dtype=values.dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return f"{IN_PROJ}, row 7, group 2: expected scale"


def change_norm(model):
    tensor = initializer(model, "backbone.norm_f.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[3] = np.nextafter(values[3], 0)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return "backbone.norm_f.weight, row 3"


def change_embedding(model):
    name = "backbone.embeddings.weight.codes"
    values = numpy_helper.to_array(initializer(model, name)).copy()
    values.reshape(-1)[300] += 2
    initializer(model, name).CopyFrom(numpy_helper.from_array(values, name))
    return "backbone.embeddings.weight, row 1"


def swap_weights(model):
    """The right weights on the wrong nodes: two layers exchange their out_proj."""
    first, second = ("backbone.layers.0.mixer.out_proj.weight", "backbone.layers.1.mixer.out_proj.weight")
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            for one, other in ((first, second), (second, first)):
                if name.startswith(one):
                    node.input[i] = name.replace(one, other)
                    break
    return "graph node"


def change_constant(model):
    tensor = next(t for t in model.graph.initializer if t.name.startswith("const_") and np.prod(t.dims) > 1)
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] += 1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return "const_"


def drop_weight(model):
    model.graph.initializer.remove(initializer(model, "backbone.norm_f.weight"))
    return "backbone.norm_f.weight: expected float32 [256], found nothing"


def change_epsilon(model):
    for prop in model.metadata_props:
        if prop.key == "tmexport.config":
            prop.value = prop.value.replace("1e-05", "1e-06")
    return "rms_eps: expected 1e-05, found 1e-06"


CHANGES = [flip_code, flip_scale, change_norm, change_embedding, swap_weights, change_constant, drop_weight, change_epsilon]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", FORMS)
def test_the_first_difference_is_named(tied, files, tmp_path, form, change):
    model = onnx.load(files[form, "q8"])
    words = change(model)
    onnx.save(model, tmp_path / "m.onnx")
    result = run("verify", tied.path, tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_changed_function_body_is_found(tied, files, tmp_path):
    model = onnx.load(files["custom", "q8"])
    model.functions[0].node[-1].op_type = "Add"
    onnx.save(model, tmp_path / "m.onnx")
    assert "functions: expected those this release writes" in run("verify", tied.path, tmp_path / "m.onnx").stderr


def test_another_checkpoint_differs(files, tied, tmp_path):
    other = write_ternary(tmp_path / "other", tied.config, 64, seed=9)
    result = run("verify", other.path, files["ort", "q8"])
    assert (result.exit_code, "expected" in result.stderr) == (1, True)


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
def test_damaged_files_are_refused_in_one_line(tied, files, tmp_path, size):
    data = files["ort", "q8"].read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[:size] if size >= 0 else b"\xff" * 1000)
    result = run("verify", tied.path, tmp_path / "m.onnx")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output


def test_a_weight_of_the_wrong_size_is_refused(tied, files, tmp_path):
    model = onnx.load(files["ort", "q8"])
    name = IN_PROJ + ".codes"
    values = numpy_helper.to_array(initializer(model, name))
    initializer(model, name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[:-1]), name))
    onnx.save(model, tmp_path / "m.onnx")
    result = run("verify", tied.path, tmp_path / "m.onnx")
    assert "expected the shape [1104, 4, 16], found [1103, 4, 16]" in result.stderr
    initializer(model, name).dims[0], initializer(model, name).raw_data = 1104, b"12"
    onnx.save(model, tmp_path / "m.onnx")
    assert f"{name} is damaged" in run("verify", tied.path, tmp_path / "m.onnx").stderr


def test_files_of_others_are_refused(tied, tmp_path):
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "m.onnx")
    assert "no tmexport metadata" in run("verify", tied.path, tmp_path / "m.onnx").stderr
    assert "no such file" in run("verify", tied.path, tmp_path / "none.onnx").stderr


def test_the_tokenizer_beside_the_file_is_compared(tied, files, tmp_path):
    (tmp_path / "m.onnx").write_bytes(files["ort", "q8"].read_bytes())
    beside = tmp_path / "m.tokenizer.json"
    beside.write_bytes(tied.tokenizer.read_bytes())
    assert run("verify", tied.path, tmp_path / "m.onnx").exit_code == 0
    beside.write_text(beside.read_text().replace("import", "export", 1) + "\n")
    result = run("verify", tied.path, tmp_path / "m.onnx")
    assert (result.exit_code, "found another in m.tokenizer.json" in result.stderr) == (1, True)
    beside.unlink()
    result = run("verify", tied.path, tmp_path / "m.onnx")
    assert (result.exit_code, "tokenizer.json in m.tokenizer.json, found no such file" in result.stderr) == (1, True)


def test_a_file_of_an_earlier_release_is_verified(tmp_path):
    """Written by commit f3e2fed, whose ort form added dt_bias and multiplied D in nodes of their own."""
    config = mamba2_model(d_model=64, n_layer=1, vocab_size=32, d_state=16, headdim=32)
    write_checkpoint(tmp_path / "ckpt", config, ternary_tensors(config, 64, seed=5))
    path = Path(__file__).parent / "files" / "ort_of_24_november.onnx"
    report = verify_onnx(open_checkpoint(tmp_path / "ckpt"), path)
    assert (report.difference, report.ternary_tensors) == (None, 2)
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Softplus")
    node.op_type = "Relu"
    onnx.save(model, tmp_path / "broken.onnx")
    assert verify_onnx(open_checkpoint(tmp_path / "ckpt"), tmp_path / "broken.onnx").difference.tensor.startswith(
        "graph node"
    )
    model = onnx.load(path)
    change_norm(model)
    onnx.save(model, tmp_path / "broken.onnx")
    assert (
        verify_onnx(open_checkpoint(tmp_path / "ckpt"), tmp_path / "broken.onnx").difference.tensor
        == "backbone.norm_f.weight"
    )
