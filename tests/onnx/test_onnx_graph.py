"""The structure of every form: valid, shapes known everywhere, standard operators only, no loops, nothing outside the file."""

import onnx
import onnxruntime as ort
import pytest

from tests.onnx.exporting import EMBEDDINGS, FORMS, TIED, export, feed, share_of_spread, token_ids
from tmexport.errors import UsageError
from tmexport.onnx.graph import build_graph

EVERY = [(form, embedding) for form in FORMS for embedding in EMBEDDINGS]


def check_whole(path):
    """onnx's checker accepts the file, and shape inference knows the shape of every tensor in it."""
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    known = {value.name: value.type.tensor_type for value in (*inferred.value_info, *inferred.output)}
    outputs = [name for node in inferred.node for name in node.output if name]
    assert len(outputs) > 20
    assert [name for name in outputs if name not in known or not known[name].HasField("shape")] == []


@pytest.mark.parametrize(("form", "embedding"), EVERY)
def test_checker_and_shape_inference(files, form, embedding):
    check_whole(files[form, embedding])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["untied", "groups"])
def test_checker_and_shape_inference_of_other_models(request, tmp_path, source, form):
    """An untied head and two groups of B and C; the last logits only, and genai's names."""
    checkpoint = request.getfixturevalue(source)
    check_whole(export(checkpoint, tmp_path / "m.onnx", form, logits="last", io_names="genai"))


@pytest.mark.parametrize("form", FORMS)
def test_operators_and_versions(files, form):
    model = onnx.load(files[form, "q8"])
    domains = {node.domain for node in model.graph.node}
    opsets = {o.domain: o.version for o in model.opset_import}
    kinds = {node.op_type for node in model.graph.node}
    bodies = [node for function in model.functions for node in function.node]
    assert domains == {"ort": {"", "com.microsoft"}, "portable": {""}, "custom": {"", "tmexport"}}[form]
    assert opsets == {"ort": {"": 23, "com.microsoft": 1}, "portable": {"": 15}, "custom": {"": 15, "tmexport": 1}}[form]  # fmt: skip
    assert model.ir_version == (11 if form == "ort" else 8)
    assert bool(bodies) == (form == "custom")
    assert {node.domain for node in bodies} <= {""}  # any conforming runtime has these
    assert not {"Loop", "Scan", "If"} & (kinds | {node.op_type for node in bodies})
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_inputs_and_outputs(files):
    graph = onnx.load(files["ort", "q8"]).graph

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    conv, ssm = ["batch", 512 + 2 * 32, 3], ["batch", 16, 32, 32]
    past = {f"past_{kind}.{i}": shape for i in range(2) for kind, shape in (("conv", conv), ("ssm", ssm))}
    present = {name.replace("past", "present"): shape for name, shape in past.items()}
    assert shapes(graph.input) == {"input_ids": ["batch", "time"], **past}
    assert shapes(graph.output) == {"logits": ["batch", "time", TIED.vocab_size], **present}


def test_genai_names(tied, tmp_path):
    graph = onnx.load(export(tied, tmp_path / "m.onnx", "ort", io_names="genai")).graph
    names = ["past_key_values.0.conv_state", "past_key_values.0.recurrent_state"]
    assert [v.name for v in graph.input][1:3] == names
    assert [v.name for v in graph.output][1:3] == ["present.0.conv_state", "present.0.recurrent_state"]


@pytest.mark.parametrize("form", FORMS)
def test_every_opset_up_to_the_newest_that_onnxruntime_has(tied, files, tmp_path, form):
    ids = token_ids(TIED, 1, 70)
    want = feed(ort.InferenceSession(files[form, "f32"]), TIED, ids)
    for opset in (18, 21, 24) if form != "ort" else (24,):
        path = export(tied, tmp_path / "m.onnx", form, "f32", opset)
        onnx.checker.check_model(str(path), full_check=True)
        assert share_of_spread(feed(ort.InferenceSession(path), TIED, ids), want) < 1e-5


@pytest.mark.parametrize(("form", "opset", "oldest"), [("portable", 14, 15), ("custom", 14, 15), ("ort", 22, 23)])
def test_an_opset_that_cannot_be_is_refused(tied, form, opset, oldest):
    with pytest.raises(UsageError, match=f"--opset is {opset}; expected {oldest} to"):
        build_graph(tied, form, opset=opset)
    with pytest.raises(UsageError, match="--opset is 1000"):
        build_graph(tied, form, opset=1000)


def test_the_same_checkpoint_gives_the_same_bytes(tied, files, tmp_path):
    for form in FORMS:
        assert export(tied, tmp_path / "m.onnx", form, "q8").read_bytes() == files[form, "q8"].read_bytes()
