"""Models with attention: trained and rounded role by role, and exported as they were trained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.model import LanguageModel, load_model
from qat.ptq.making import make
from qat.quantizer import make_low_bit, quantized_weights
from qat.recipe import Recipe
from qat.train.training import train
from tests.models import train_tokenizer
from tests.tmexport.families import save
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import CheckpointError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.gguf.reader import open_gguf
from tmexport.model import llama_model
from tmexport.types import KINDS, GGMLType
from tmexport.verify import verify_gguf

ROLES = {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    for name in ("llama", "granite", "falcon"):
        save(name, root / name)
        train_tokenizer(root / name / "tokenizer.json")
    return root


def exported(folder: Path, path: Path):
    """The GGUF of a checkpoint, verified."""
    checkpoint = open_checkpoint(folder)
    plan_export(checkpoint).write(path, lambda tensor: None)
    file = open_gguf(path)
    assert verify_gguf(checkpoint, file).difference is None
    return file


@pytest.mark.parametrize("name", ["llama", "granite", "falcon"])
def test_a_step_trains_every_ternary_weight_and_what_is_written_is_what_was_trained(name, teachers, corpus, tmp_path):
    recipe = Recipe(steps=2, seq_len=32, batch_size=2, lr=1e-3, threads=1, eval_every=10, save_every=10)
    train(recipe, [corpus], tmp_path / "student", teachers / name)
    rows = [json.loads(row) for row in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["loss"] != rows[0]["loss"]
    student = open_checkpoint(tmp_path / "student")
    assert {role for role in student.coded} == ROLES & {t.role for t in student.config.tensors.values()}
    file = exported(tmp_path / "student", tmp_path / "m.gguf")
    for (
        tensor
    ) in student.config.tensors.values():  # the widest groups that fit the rows, in the smallest type that holds them
        if tensor.block is not None and tensor.low_bit:
            rows_of, wide = tensor.shape[1], GGMLType.TQ1_0
            assert file.tensors[tensor.gguf].type is (wide if rows_of % 256 == 0 else GGMLType.Q2_0), tensor.gguf


def test_gradients_reach_every_latent_weight():
    torch.manual_seed(0)
    model = make_low_bit(LanguageModel(llama_model(128, 2, 64, 4, 192, 2)), "ternary", 0)
    model(torch.arange(12)[None]).square().sum().backward()
    assert len(quantized_weights(model)) == 14
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_what_is_not_ternary_trains_as_int4(teachers):
    """The codes are those of the exporter's rule for the same weights."""
    model = load_model(teachers / "granite")
    latent = {name: weight.detach().numpy().copy() for name, weight in model.named_parameters()}
    make_low_bit(model, "ternary", 64, projections="in_proj", rest="int4")
    for name, coded in quantized_weights(model).items():
        kind, size = ("ternary", 64) if name.endswith("in_proj.weight") else ("int4", 32)
        assert np.array_equal(coded.dense(), KINDS[kind].quantize(latent[name], size).dense()), name
    assert len(quantized_weights(model)) == len(model.projections())


def test_mixers_ternary_the_mlp_int4_the_embedding_int8(teachers, tmp_path):
    make("rtn", teachers / "granite", tmp_path / "out", embedding="int8", projections="mixers", rest="int4")
    checkpoint = open_checkpoint(tmp_path / "out")
    kinds = {role: form.kind for role, form in checkpoint.coded.items()}
    mixers = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert kinds == dict.fromkeys(mixers, "ternary") | dict.fromkeys(mlp, "int4") | {"embedding": "int8"}
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (raw["version"], raw["weights"]["gate_proj"]) == (2, {"kind": "int4", "group_size": 32})
    file = exported(tmp_path / "out", tmp_path / "m.gguf")
    types = {name.split(".", 2)[-1]: info.type.name for name, info in file.tensors.items() if name.endswith(".weight")}
    assert (types["ssm_in.weight"], types["ffn_up.weight"], file.tensors["token_embd.weight"].type.name) == (
        "TQ1_0",
        "Q4_0",
        "Q8_0",
    )


def test_what_is_not_chosen_stays_dense(teachers, tmp_path):
    make("rtn", teachers / "falcon", tmp_path / "out", projections="in_proj,down_proj")
    checkpoint = open_checkpoint(tmp_path / "out")
    assert {role: form.group_size for role, form in checkpoint.coded.items()} == {"in_proj": 256, "down_proj": 64}
    teacher = open_checkpoint(teachers / "falcon")
    for name in checkpoint.names:
        if checkpoint.form(name) is None:
            assert (checkpoint.dense(name) == teacher.dense(name)).all(), name
    file = exported(tmp_path / "out", tmp_path / "m.gguf")
    assert file.tensors["blk.0.ffn_down.weight"].type is GGMLType.Q2_0
    assert file.tensors["blk.0.attn_q.weight"].type is GGMLType.F16
    with pytest.raises(UsageError, match="no projections 'x_proj'; expected all, mixers or some of in_proj"):
        make("rtn", teachers / "falcon", tmp_path / "other", projections="in_proj,x_proj")


def test_gptq_of_a_hybrid_is_nearer_than_rounding(teachers, tmp_path):
    ids = torch.randint(0, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    errors = {}
    for method in ("rtn", "gptq"):
        make(method, teachers / "granite", tmp_path / method, ids=ids, group_size=64)
        with torch.no_grad():
            wanted, found = (load_model(folder)(ids) for folder in (teachers / "granite", tmp_path / method))
        errors[method] = float((found - wanted).square().mean())
    assert errors["gptq"] < errors["rtn"]


def test_codes_that_config_json_would_multiply_are_refused(teachers, tmp_path):
    make("rtn", teachers / "falcon", tmp_path, group_size=64)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"key_multiplier": 0.5}))
    with pytest.raises(CheckpointError, match="the weights of k_proj are codes, but config.json multiplies them"):
        open_checkpoint(tmp_path)
