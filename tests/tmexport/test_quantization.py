"""Checkpoints whose roles are stored in different ways: written, read, exported, proven, and run by a stock llama.cpp."""

import json

import numpy as np
import pytest

from runtime_ref.gguf_source import gguf_source
from runtime_ref.model import Model
from runtime_ref.reference import ReferenceModel
from runtime_ref.reference.ternary import TernaryMatrix
from runtime_ref.weights import load_weights
from tests.llama import Llama
from tests.models import SMALL, coded_tensors, train_tokenizer
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import coded_kind
from tmexport.gguf.reader import open_gguf
from tmexport.inspect import inspect_path
from tmexport.model import mamba2_model
from tmexport.types import Coded, GGMLType
from tmexport.verify import verify_gguf

TIED = mamba2_model(256, 2, 512, d_state=64)
GROUPS = mamba2_model(256, 2, 512, d_state=64, n_groups=2)
CASES = {
    "binary": (TIED, "binary", "dense", GGMLType.Q1_0, GGMLType.F16),
    "ternary embedding": (TIED, "ternary", "ternary", GGMLType.TQ1_0, GGMLType.TQ1_0),
    "binary, ternary embedding and head": (SMALL, "binary", "ternary", GGMLType.Q1_0, GGMLType.TQ1_0),
    "int8": (GROUPS, "int8", "int8", GGMLType.Q8_0, GGMLType.Q8_0),
    "int4, int8 embedding and head": (SMALL, "int4", "int8", GGMLType.Q4_0, GGMLType.Q8_0),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """folder, tensors, and the types of the projections and of the embedding that auto must choose."""
    config, projections, embedding, of_blocks, of_embedding = CASES[request.param]
    folder = tmp_path_factory.mktemp("coded")
    tensors = coded_tensors(config, projections, embedding)
    write_checkpoint(folder / "ckpt", config, tensors, train_tokenizer(folder / "tokenizer.json"))
    return folder, tensors, of_blocks, of_embedding


def test_a_checkpoint_says_how_each_role_is_stored(case):
    folder, tensors, *_ = case
    written = json.loads((folder / "ckpt" / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["version"]) == ("tmexport", 2)
    checkpoint = open_checkpoint(folder / "ckpt")
    for name, tensor in tensors.items():
        if isinstance(tensor, Coded):
            read = checkpoint.codes(name)
            assert type(read) is type(tensor)
            assert np.array_equal(read.codes, tensor.codes)
            assert np.array_equal(read.scales, tensor.scales)
            role = checkpoint.config.tensors[name].role
            assert written["weights"][role] == {"kind": tensor.kind, "group_size": tensor.group_size}
        else:
            assert np.array_equal(checkpoint.dense(name), tensor)


def test_auto_is_the_smallest_exact_type_and_verify_agrees(case):
    folder, _, of_blocks, of_embedding = case
    checkpoint = open_checkpoint(folder / "ckpt")
    plan = plan_export(checkpoint)
    plan.write(folder / "auto.gguf", lambda tensor: None)
    types = {name: info.type for name, info in open_gguf(folder / "auto.gguf").tensors.items()}
    assert types["blk.1.ssm_in.weight"] is types["blk.0.ssm_out.weight"] is of_blocks
    assert types["token_embd.weight"] is types.get("output.weight", of_embedding) is of_embedding
    report = verify_gguf(checkpoint, open_gguf(folder / "auto.gguf"))
    assert report.difference is None
    assert report.ternary_tensors == 4 + (of_embedding is not GGMLType.F16) * (2 if "output.weight" in types else 1)
    assert inspect_path(folder / "ckpt").as_dict()["format"].endswith("checkpoint")


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


# llama.cpp rounds the scale of every 32 activations to fp16, which random weights amplify; with 256 it does not
LIMITS = {
    GGMLType.Q8_0: 0.02,
    GGMLType.TQ1_0: 0.004,
    GGMLType.TQ2_0: 0.004,
    GGMLType.Q1_0: 0.04,
    GGMLType.Q2_0: 0.04,
    GGMLType.Q4_0: 0.04,
}


def kinds_for(of_blocks):
    """Types that hold the projections: groups of 128 with different scales do not fit blocks of 256."""
    if of_blocks in (GGMLType.Q8_0, GGMLType.Q4_0):
        return ["auto"]
    return ["auto", "q2_0", "q4_0"] + (["tq2_0"] if of_blocks is GGMLType.TQ1_0 else [])


def test_llamacpp_loads_every_type_and_agrees_with_profile_fast(case):
    folder, _, of_blocks, _ = case
    for kind in kinds_for(of_blocks):
        agrees_with_llamacpp(folder, kind)


def agrees_with_llamacpp(folder, kind):
    path = folder / f"{kind}.gguf"
    plan_export(open_checkpoint(folder / "ckpt"), kind).write(path, lambda tensor: None)
    limit, llama = (
        max(LIMITS[info.type] for info in open_gguf(path).tensors.values() if info.type in LIMITS),
        Llama(path),
    )
    prompt = llama.tokenize("Fellow citizens of the Senate")
    found = llama.greedy(prompt, 12)
    model = ReferenceModel(load_weights(gguf_source(path)), "fast")
    state = model.new_state()
    for own in state.branches:
        own["ssm"] = own["ssm"].astype(np.float32)  # as llama.cpp keeps it
    for token in prompt:
        logits = model.step(state, token)
    for token, log_probability in found:
        assert abs(log_softmax(logits)[token] - log_probability) < limit, kind
        logits = model.step(state, token)


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_kernels_equal_the_specification_and_exact_does_not_see_the_container(case, profile):
    folder, _, of_blocks, _ = case
    digests = set()
    for kind in kinds_for(of_blocks):
        path = folder / f"kernels-{kind}.gguf"
        plan_export(open_checkpoint(folder / "ckpt"), kind).write(path, lambda tensor: None)
        model, reference = Model.load(path, profile, 1), ReferenceModel(load_weights(gguf_source(path)), profile)
        state, wanted = model.new_state(), reference.new_state()
        tokens = [3, 141, 59, 26, 5]
        rows = np.concatenate(list(model.score(state, tokens)))
        for row, token in zip(rows, tokens, strict=True):
            assert row.tobytes() == reference.step(wanted, token).tobytes()
        digests.add(rows.tobytes())
    assert profile == "fast" or len(digests) == 1


def test_what_cannot_be_is_refused(case, tmp_path):
    folder, tensors, *_ = case
    checkpoint = open_checkpoint(folder / "ckpt")
    kinds = {t.kind for t in tensors.values() if isinstance(t, Coded)}
    if "int8" in kinds:
        with pytest.raises(UsageError, match="in_proj is int., which TQ1_0 does not hold exactly; use --type auto, q"):
            plan_export(checkpoint, "tq1_0")
    if kinds != {"ternary"}:
        return
    with pytest.raises(UsageError, match="in_proj is ternary, which Q1_0 does not hold exactly; use --type auto, "):
        plan_export(checkpoint, "q1_0")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "tmexport", "version": 3, "weights": {}}, "version 3; this release reads 2"),
        ({"quant_method": "tmexport", "version": 2}, "weights is None; expected an object"),
        (
            {"quant_method": "tmexport", "version": 2, "weights": {"up": {}}},
            "weights has 'up'; expected embedding, in_proj, out_proj",
        ),
        (
            {"quant_method": "tmexport", "version": 2, "weights": {"in_proj": {"kind": "int3"}}},
            "kind of weights is 'int3'",
        ),
        (
            {"quant_method": "tmexport", "version": 2, "weights": {"in_proj": {"kind": "binary", "group_size": 64}}},
            "group_size is 64; expected 128",
        ),
        ({"quant_method": ["x"], "version": 2}, "expected none, or quant_method 'ternary' or 'tmexport'"),
    ],
)
def test_a_quantization_config_that_cannot_be_read(tmp_path, config, message):
    write_checkpoint(tmp_path, TIED, coded_tensors(TIED, "dense"), None)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_roles_of_different_kinds_in_one_file(tmp_path):
    """Ternary in_proj, int4 out_proj, both as Q4_0 or each as auto says: the file tells them apart."""
    tensors = coded_tensors(TIED, {"in_proj": "ternary", "out_proj": "int4"}, "int8")
    write_checkpoint(tmp_path / "ckpt", TIED, tensors, train_tokenizer(tmp_path / "tokenizer.json"))
    checkpoint, digests = open_checkpoint(tmp_path / "ckpt"), set()
    for kind, of_in in (("auto", GGMLType.TQ1_0), ("q4_0", GGMLType.Q4_0)):
        path = tmp_path / f"{kind}.gguf"
        plan = plan_export(checkpoint, kind)
        plan.write(path, lambda tensor: None)
        assert plan.metadata["tmexport.int4"] == ["ssm_out.weight"]
        gguf = open_gguf(path)
        assert gguf.tensors["blk.0.ssm_in.weight"].type is of_in
        assert verify_gguf(checkpoint, gguf).difference is None
        assert coded_kind(gguf, "blk.1.ssm_in.weight") == "ternary"
        assert coded_kind(gguf, "blk.1.ssm_out.weight") is None
        source = gguf_source(path)
        found = source.matrix("blk.1.ssm_out.weight")
        assert np.array_equal(found.codes, tensors["backbone.layers.1.mixer.out_proj.weight"].codes)
        assert isinstance(source.matrix("blk.0.ssm_in.weight"), TernaryMatrix)
        weights = load_weights(source)
        model, reference = Model.load(path, "exact", 1), ReferenceModel(weights, "exact")
        logits = np.concatenate(list(model.score(model.new_state(), [3, 141])))
        state = reference.new_state()
        assert logits.tobytes() == b"".join(reference.step(state, token).tobytes() for token in (3, 141))
        digests.add(logits.tobytes())
    assert len(digests) == 1
    agrees_with_llamacpp(tmp_path, "auto")


def test_verify_sees_one_changed_code_of_a_block(tmp_path):
    tensors = coded_tensors(TIED, "int8", "int8")
    write_checkpoint(tmp_path / "ckpt", TIED, tensors)
    path = tmp_path / "m.gguf"
    plan_export(open_checkpoint(tmp_path / "ckpt"), ids_only=True).write(path, lambda tensor: None)
    data = bytearray(path.read_bytes())
    data[open_gguf(path).tensors["token_embd.weight"].offset + 34 * 8 + 5] ^= 1  # row 1, block 0, code 3
    path.write_bytes(data)
    found = verify_gguf(open_checkpoint(tmp_path / "ckpt"), open_gguf(path)).difference
    assert (found.tensor, found.row, found.group) == ("token_embd.weight", 1, 0)
    assert "column 3" in found.expected
