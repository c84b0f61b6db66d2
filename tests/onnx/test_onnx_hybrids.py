"""Models with attention and MLPs in every form: transformers' numbers, runtime_ref's bits, the same in parts, proven equal."""

import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from runtime_ref.model import Model
from runtime_ref.ort import OrtModel
from tests.models import RANDOM, random_ternary
from tests.onnx.exporting import FORMS, export, run
from tests.tmexport.families import FAMILIES, save
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import UsageError
from tmexport.gguf.export import plan_export
from tmexport.onnx.names import OnnxError
from tmexport.onnx.verify import verify_onnx

PARTS = (11, 12, 13)  # a prompt in two, single tokens, and the rest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> the checkpoint, ids [2, 40], and transformers' logits of them."""
    root, found = tmp_path_factory.mktemp("families"), {}
    ids = np.random.default_rng(3).integers(0, 512, (2, 40))
    for name in FAMILIES:
        theirs = save(name, root / name)
        with torch.no_grad():
            found[name] = (
                open_checkpoint(root / name),
                ids,
                theirs(torch.from_numpy(ids), use_cache=False).logits.numpy(),
            )
    return found


def coded(checkpoint, folder, kinds, embedding="dense"):
    """A model of the same dimensions and small tensors whose projections are random codes: a kind, or one by role."""
    config = checkpoint.config
    tensors = {name: checkpoint.dense(name) for name in checkpoint.names}
    for seed, (name, tensor) in enumerate(config.tensors.items()):
        inside = kinds if isinstance(kinds, str) else kinds.get(tensor.role, "dense")
        kind = embedding if tensor.block is None else inside
        if tensor.low_bit and kind != "dense":
            tensors[name] = MAKERS[kind](*tensor.shape, seed)
    write_checkpoint(folder, config, tensors)
    return open_checkpoint(folder)


MAKERS = RANDOM | {"ternary64": lambda n, k, seed: random_ternary(n, k, 64, seed)}
MIXERS = dict.fromkeys(("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"), "ternary")
MIXED = MIXERS | {"gate_proj": "int4", "up_proj": "int4", "down_proj": "int8"}


def in_parts(model, ids):
    state = model.new_state(len(ids))
    parts = [model.run(state, part) for part in np.split(ids, PARTS, axis=1)]
    return np.concatenate(parts, axis=1), state


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_logits_are_those_of_transformers_whole_and_in_parts(saved, tmp_path, name, form):
    checkpoint, ids, wanted = saved[name]
    path = export(checkpoint, tmp_path / "m.onnx", form, "f32", projections="f32")
    onnx.checker.check_model(str(path), full_check=True)
    model = OrtModel.load(path, threads=1)
    assert np.abs(model.run(model.new_state(2), ids) - wanted).max() < 1e-4
    assert np.abs(in_parts(model, ids)[0] - wanted).max() < 1e-4
    assert verify_onnx(checkpoint, path).difference is None


def digest(logits):
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "kinds", "embedding"),
    [
        ("granite", MIXED, "int8"),
        ("granite-rope-8-groups", MIXERS, "dense"),  # the MLP stays dense: fp16 in both files
        ("llama-tied-one-kv-head", "ternary64", "int4"),
        ("falcon", "ternary64", "dense"),
        ("falcon-norm-2-groups", {"in_proj": "int8", "q_proj": "ternary64", "o_proj": "int4"}, "dense"),
    ],
)
def test_custom_with_kernels_has_the_bits_of_runtime_ref(saved, tmp_path, name, kinds, embedding):
    checkpoint = coded(saved[name][0], tmp_path / "ckpt", kinds, embedding)
    ids = saved[name][1]
    plan_export(checkpoint, "auto", "q8_0" if embedding == "dense" else "auto").write(
        tmp_path / "m.gguf", lambda tensor: None
    )
    runtime = Model.load(tmp_path / "m.gguf", "exact", threads=1)
    wanted = np.stack([np.concatenate(list(runtime.score(runtime.new_state(), row))) for row in ids])
    path = export(checkpoint, tmp_path / "m.onnx", "custom")
    model = OrtModel.load(path, threads=1, kernels=True)
    assert digest(model.run(model.new_state(2), ids)) == digest(wanted)
    assert digest(in_parts(model, ids)[0]) == digest(wanted)
    assert verify_onnx(checkpoint, path).difference is None


@pytest.mark.parametrize("kind", ["ternary", "binary", "int8", "int4"])
def test_ort_computes_the_codes_of_every_kind(saved, tmp_path, kind):
    """Against the portable form, whose fp32 products are exact but for rounding; the weights are proven bit for bit."""
    checkpoint = coded(saved["llama"][0], tmp_path / "ckpt", kind, "int8")
    ids, logits = saved["llama"][1], {}
    for form in ("portable", "ort"):
        path = export(checkpoint, tmp_path / f"{form}.onnx", form)
        report = verify_onnx(checkpoint, path)
        assert (report.difference, report.ternary_tensors) == (None, 3 * 7 + 2)
        model = OrtModel.load(path, threads=1)
        logits[form] = model.run(model.new_state(2), ids)
    theirs = save("llama", tmp_path / "theirs")
    with torch.no_grad():
        theirs.load_state_dict(
            {checkpoint.config.tensors[n].file: torch.from_numpy(checkpoint.dense(n)) for n in checkpoint.names}
        )
        wanted = theirs(torch.from_numpy(ids), use_cache=False).logits.numpy()
    assert np.abs(logits["portable"] - wanted).max() < 1e-4
    error = logits["ort"] - wanted
    assert np.sqrt((error**2).mean()) < 0.05 * wanted.std()


def test_eight_and_four_bits_lie_in_the_file_as_the_checkpoint_has_them(saved, tmp_path):
    checkpoint = coded(saved["granite"][0], tmp_path / "ckpt", MIXED, "int8")
    model = onnx.load(export(checkpoint, tmp_path / "m.onnx", "ort"))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name = next(n for n, t in checkpoint.config.tensors.items() if t.role == "gate_proj")
    codes = np.stack([stored[f"{name}.codes"] % 16, stored[f"{name}.codes"] // 16], axis=-1).astype(int) - 8
    assert np.array_equal(codes.reshape(512, 256), checkpoint.codes(name).codes)
    assert np.array_equal(stored[f"{name}.scales"], checkpoint.codes(name).scales.astype(np.float32))
    assert stored[f"{name}.scales"].min() < 0  # a sign that Q4_0 keeps
    name = next(n for n, t in checkpoint.config.tensors.items() if t.role == "down_proj")
    assert np.array_equal(stored[f"{name}.codes"].astype(int).reshape(256, 512) - 128, checkpoint.codes(name).codes)
    head = next(node for node in model.graph.node if node.op_type == "MatMulNBits" and "embed" in node.input[1])
    attributes = {a.name: a.i for a in head.attribute}
    assert (attributes["bits"], attributes["block_size"]) == (8, 32)


def test_verify_finds_a_changed_code_and_a_changed_sign(saved, tmp_path):
    checkpoint = coded(saved["granite"][0], tmp_path / "ckpt", MIXED, "int8")
    for form in FORMS:
        path = export(checkpoint, tmp_path / "m.onnx", form)
        model = onnx.load(path)
        for part, words in (("codes", "row 3, group 0: expected code"), ("scales", "row 3, group 0: expected scale")):
            broken = onnx.ModelProto()
            broken.CopyFrom(model)
            tensor = next(t for t in broken.graph.initializer if t.name.endswith(f"gate_proj.weight.{part}"))
            values = numpy_helper.to_array(tensor).copy()
            place = values.reshape(512, -1)[3]
            place[0] = -place[0] if part == "scales" else place[0] ^ 1
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            onnx.save(broken, tmp_path / "broken.onnx")
            result = run("verify", checkpoint.path, tmp_path / "broken.onnx")
            assert result.exit_code == 1
            assert words in result.stderr + result.stdout


def test_the_state_of_attention_grows_and_goes_from_form_to_form(saved, tmp_path):
    checkpoint, ids, wanted = saved["falcon"]
    models = {
        f: OrtModel.load(export(checkpoint, tmp_path / f"{f}.onnx", f, "f32", projections="f32"), 1) for f in FORMS
    }
    state = models["ort"].new_state(2)
    models["ort"].run(state, ids[:, :20])
    for position in range(20, 24):
        for form in ("portable", "ort"):
            continued = models[form].state_from(state.arrays())
            assert (
                np.abs(models[form].run(continued, ids[:, position : position + 1])[:, 0] - wanted[:, position]).max()
                < 1e-4
            )
        state = continued
    arrays = state.arrays()
    assert (state.positions, arrays["past_k.2"].shape, arrays["past_ssm.2"].shape) == (
        24,
        (2, 2, 24, 32),
        (2, 6, 64, 64),
    )
    with pytest.raises(OnnxError, match=r"past_v.0 is float32 \[2, 2, 24, 32\]; expected float32 \[2, 2, 23, 32\]"):
        models["ort"].state_from(arrays | {"past_k.0": arrays["past_k.0"][:, :, 1:]})


def test_a_text_longer_than_the_context_is_refused_before_it_is_read(saved, tmp_path):
    checkpoint = saved["llama"][0]
    model = OrtModel.load(export(checkpoint, tmp_path / "m.onnx", "ort", "f32", projections="f32"), 1)
    state = model.new_state()
    model.prefill(state, [1] * 512)
    with pytest.raises(UsageError, match="the text has 512 tokens and 1 more; the model's context holds 512"):
        model.decode(state, 1)
    with pytest.raises(UsageError, match="0 tokens and 600 more"):
        model.run(model.new_state(), np.ones((1, 600), np.int64))


def test_the_command_line_says_what_it_wrote(saved, tmp_path):
    checkpoint = coded(saved["granite"][0], tmp_path / "ckpt", MIXED, "int8")
    result = run("onnx", checkpoint.path, tmp_path / "m.onnx", "--ops", "portable", "--json")
    assert json.loads(result.stdout)["group_size"] == 256
    states = json.loads((tmp_path / "m.config.json").read_text())["state"]
    assert {
        "input": "past_k.2",
        "output": "present_k.2",
        "shape": ["batch", 2, "past", 32],
        "dtype": "float32",
        "initial": 0.0,
    } in states
    assert run("verify", checkpoint.path, tmp_path / "m.onnx").exit_code == 0
    report = json.loads(run("inspect", tmp_path / "m.onnx", "--json").stdout)
    kinds = {
        tensor["name"].split(".")[-2]: tensor["type"]
        for tensor in report["tensors"]
        if tensor["name"].startswith("backbone.layers")
    }
    assert (kinds["q_proj"], kinds["gate_proj"], kinds["down_proj"]) == ("2-bit + F16", "4-bit + F16", "8-bit + F16")
    assert run("onnx", checkpoint.path, tmp_path / "d.onnx", "--type", "f16").exit_code == 0
    assert run("verify", checkpoint.path, tmp_path / "d.onnx").exit_code == 0
