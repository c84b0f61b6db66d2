"""The stages of a hybrid: what each trains and leaves alone, an interrupted run equal to a whole one, and matrices against scans."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

import qat.train.cli
from qat.convert.making import convert
from qat.data import Batches, tokenize_files
from qat.losses import orientation_loss
from qat.model import LanguageModel, load_model
from qat.ptq.making import calibration_ids
from qat.recipe import Recipe
from qat.train.hooks import Hook
from qat.train.stages import DEFAULTS, load_stages, train_stages
from qat.train.step import freeze, make_optimizer
from qat.train.training import train
from tests.commands import invoke
from tests.qat.tiny import tiny_config
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import UsageError
from tmexport.gguf.export import plan_export
from tmexport.model import llama_model

SETTINGS = "steps = 4\nseq_len = 24\nbatch_size = 2\nlr = 2e-3\nthreads = 1\neval_every = 2\nsave_every = 3\n"
RECIPE = "".join(f"[{stage}]\n{SETTINGS}" for stage in DEFAULTS).replace("[distill]", "refit_tokens = 96\n[distill]")


@pytest.fixture(scope="module")
def folders(corpus, tokenizer_path, tmp_path_factory):
    """A small Transformer and its hybrid, the first layer of two kept, and the recipe."""
    root = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    model = LanguageModel(llama_model(64, 2, 300, 2, 128, 1, tie_embeddings=True, eos_token_id=0))
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    write_checkpoint(root / "teacher", model.config, tensors, tokenizer_path)
    ids = calibration_ids(root / "teacher", [corpus], None, 8, 24, 0, root / "cache")
    convert(root / "teacher", "0,", root / "hybrid", ids)
    (root / "recipe.toml").write_text(RECIPE)
    return root


def run(folders, corpus, out, **more):
    stages = load_stages(str(folders / "recipe.toml"), {})
    more = {"held_out": [corpus], **more}
    return train_stages(stages, [corpus], out, folders / "teacher", folders / "hybrid", **more)


@pytest.fixture(scope="module")
def whole(folders, corpus):
    run(folders, corpus, folders / "whole")
    return folders / "whole"


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_each_stage_changes_what_it_trains_and_no_more(folders, whole):
    models = [load_model(path).state_dict() for path in (folders / "hybrid", *(whole / s for s in DEFAULTS))]
    started, oriented, aligned, distilled, ternary = models

    def changed(before, after):
        return {name for name in before if not torch.equal(before[name], after[name])}

    mixer = {name for name in started if ".mamba2." in name}
    mixing = {name for name in mixer if not name.endswith(("out_proj.weight", "norm.weight"))}
    assert changed(started, oriented) == mixing  # x, z, the norm and out_proj are no part of the matrices
    rest = slice(0, 2 * 128)  # rows of z and x
    assert torch.equal(started["backbone.layers.2.mamba2.in_proj.weight"][rest], oriented["backbone.layers.2.mamba2.in_proj.weight"][rest])  # fmt: skip
    assert changed(oriented, aligned) == mixer
    assert changed(aligned, distilled) == set(started) - {"backbone.embeddings.weight"}
    coded = open_checkpoint(whole / "ternary").coded
    assert set(coded) >= {"in_proj", "out_proj", "q_proj", "gate_proj"}
    assert "embedding" not in coded
    assert torch.equal(ternary["backbone.embeddings.weight"], distilled["backbone.embeddings.weight"])


def test_losses_fall_and_each_is_its_own(whole):
    for stage, has_kl in (("orient", False), ("align", False), ("distill", True), ("ternary", True)):
        found = rows(whole / stage)
        assert [("kl" in row) for row in found] == [has_kl] * 4
        assert all("held_out_bits_per_byte" in row for row in found[1::2])
    assert rows(whole / "orient")[-1]["loss"] < rows(whole / "orient")[0]["loss"]
    for row in rows(whole / "distill"):
        assert row["loss"] == pytest.approx(row["kl"])  # no label


def test_the_ternary_stage_imitates_the_hybrid(folders, whole, corpus, tmp_path):
    """Its first step's KL is that of a run by hand whose teacher and student are the distilled hybrid."""
    recipe = load_stages(str(folders / "recipe.toml"), {})["ternary"]
    train(recipe, [corpus], tmp_path / "hand", whole / "distill")
    assert rows(tmp_path / "hand")[0]["kl"] == rows(whole / "ternary")[0]["kl"]


@pytest.mark.parametrize("stop", [("align", 2), ("align", 4), ("distill", 1), ("ternary", 3)])
def test_interrupted_and_resumed_is_the_whole_run_bit_for_bit(folders, whole, corpus, tmp_path, stop):
    class PressCtrlC(Hook):
        def after_step(self, training):
            if (training.run.table, training.step) == stop:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(folders, corpus, tmp_path / "parts", hooks=[PressCtrlC()])
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume"):
        run(folders, corpus, tmp_path / "parts")
    run(folders, corpus, tmp_path / "parts", resume=True)
    for stage in DEFAULTS:
        assert rows(tmp_path / "parts" / stage) == rows(whole / stage), stage
        for file in ("model.safetensors", "config.json", "recipe.toml"):
            assert (tmp_path / "parts" / stage / file).read_bytes() == (whole / stage / file).read_bytes(), (
                stage,
                file,
            )


@pytest.fixture(scope="module")
def loud(folders, corpus, tmp_path_factory):
    """The same with one large channel in the residual stream, as pretrained Transformers have: there bf16 counts in steps of one."""
    root = tmp_path_factory.mktemp("loud")
    model = load_model(folders / "teacher").requires_grad_(False)
    model.backbone.embeddings.weight[:, 5] += 200
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    write_checkpoint(root / "teacher", model.config, tensors, folders / "teacher" / "tokenizer.json")
    ids = calibration_ids(root / "teacher", [corpus], None, 8, 24, 0, root / "cache")
    convert(root / "teacher", "0,", root / "hybrid", ids)
    (root / "recipe.toml").write_text(RECIPE)
    return root


@pytest.mark.parametrize("pair", ["folders", "loud"])
def test_out_proj_is_fitted_in_fp32_whatever_the_rest_computes_in(pair, request, corpus, tmp_path):
    """No worse than numpy's least squares in fp64: with moments or hidden states in bf16, as autocast makes them, models were ruined."""
    folders = request.getfixturevalue(pair)
    stages = load_stages(str(folders / "recipe.toml"), {"dtype": "bfloat16"})
    run_ = replace(stages["align"], refit_tokens=96)
    train(run_, [corpus], tmp_path / "a", folders / "teacher", None, None, False, None, (), folders / "hybrid", "align")
    teacher, hybrid = load_model(folders / "teacher"), load_model(tmp_path / "a")
    stream = tokenize_files([corpus], folders / "teacher" / "tokenizer.json", 300, 0, tmp_path)
    batches = Batches(np.array(stream.tokens), 24, 2, run_.seed)
    ids = torch.cat([torch.from_numpy(batches(step)[:, :-1]) for step in range(2)])
    mixer = hybrid.backbone.blocks[2].branches[0]
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states, wanted = list(hybrid.stream(ids)), list(teacher.stream(ids))
    features, target = seen[0].flatten(0, -2).double().numpy(), (wanted[3] - states[2]).flatten(0, -2).double().numpy()
    moments = features.T @ features
    ridge = 0.03 * moments.diagonal().mean() * np.eye(len(moments))
    best = np.linalg.solve(moments + ridge, features.T @ target)
    left = [np.square(features @ weight - target).sum() for weight in (mixer.out_proj.weight.detach().numpy().T, best)]
    assert left[0] < 1.2 * left[1]  # 46 times as much before; what is left is the rounding of what the model computes


def test_compiled_layers_are_fitted_too(folders, corpus, tmp_path):
    """The fit reads out_proj's features by a hook, which a compiled layer does not see."""
    stages = load_stages(str(folders / "recipe.toml"), {"compile": True})
    for name, recipe in (("compiled", stages["align"]), ("eager", replace(stages["align"], compile=False))):
        train(recipe, [corpus], tmp_path / name, folders / "teacher", student=folders / "hybrid", table="align")
    compiled, eager = (load_model(tmp_path / name).state_dict() for name in ("compiled", "eager"))
    for name, tensor in eager.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_teacher_may_be_a_gguf(folders, corpus, tmp_path):
    """What it multiplies out to is the checkpoint it was exported from, in fp16."""
    plan_export(open_checkpoint(folders / "teacher"), "f16").write(tmp_path / "t.gguf", lambda tensor: None)
    recipe = tmp_path / "short.toml"
    recipe.write_text(f"[align]\n{SETTINGS}")
    args = ["--student", folders / "hybrid", "--recipe", recipe, "--data", corpus, "--json"]
    result = invoke(qat.train.cli.main, "--teacher", tmp_path / "t.gguf", "--out", tmp_path / "a", *args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["align"]["steps"] == 4
    invoke(qat.train.cli.main, "--teacher", folders / "teacher", "--out", tmp_path / "b", *args)
    losses = [rows(tmp_path / name / "align")[0]["loss"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_mixing_matrices_times_values_are_the_branches(folders):
    """Of Mamba-2: what its scan gives, D included. Of attention: what enters o_proj."""
    model = load_model(folders / "hybrid").requires_grad_(False)
    hidden = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    mixer, attention = model.backbone.blocks[2].branches[0], model.backbone.blocks[0].branches[0]
    mixer.D.uniform_(0.5, 1.5)
    mixer.in_proj.weight[-4:].normal_(std=0.1)  # dt depends on the input
    seen = []
    mixer.scanned.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    mixer(hidden)
    x = mixer.conv1d(mixer.in_proj(hidden).split([128, 256, 4], -1)[1])[0][..., :128].unflatten(-1, (4, 32))
    mixed = torch.einsum("bhls,bshp->blhp", mixer.mixing(hidden), x)
    torch.testing.assert_close(mixed, seen[0], rtol=1e-4, atol=1e-5)
    seen.clear()
    attention.o_proj.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    attention(hidden)
    v = attention.v_proj(hidden).unflatten(-1, (1, 32)).expand(-1, -1, 2, -1)
    mixed = torch.einsum("bhls,bshp->blhp", attention.mixing(hidden), v).flatten(2)
    torch.testing.assert_close(mixed, seen[0], rtol=1e-4, atol=1e-5)


def test_orientation_is_a_relative_frobenius_distance(folders):
    teacher, student = (load_model(folders / name) for name in ("teacher", "hybrid"))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        pairs = list(teacher.mixing(ids))
        block = student.backbone.blocks[2]
        found = block.branches[0].mixing(block.norm(pairs[2][0])).double().numpy()
    wanted = pairs[2][1].double().numpy()
    freeze(student, Recipe(rest_lr=0.0))
    loss = orientation_loss(student.backbone.blocks, teacher.mixing(ids))
    summed = np.stack([found[:, 0] + found[:, 1], found[:, 2] + found[:, 3]], 1)
    assert loss.item() == pytest.approx(((summed - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-5)
    assert [pair[1] is None for pair in pairs] == [False, True, False, True]


def test_flags_of_low_bit_weights_are_of_the_last_stage(folders):
    stages = load_stages(str(folders / "recipe.toml"), {"weights": "int4", "lr": 0.5})
    assert [recipe.weights for recipe in stages.values()] == ["dense"] * 3 + ["int4"]
    assert {recipe.lr for recipe in stages.values()} == {0.5}


def test_plan_of_stages(folders):
    args = ["--plan", "--recipe", folders / "recipe.toml"]
    args += ["--teacher", folders / "teacher", "--student", folders / "hybrid"]
    plans = json.loads(invoke(qat.train.cli.main, *args, "--json").stdout)
    assert list(plans) == list(DEFAULTS)
    tensors = load_model(folders / "hybrid").state_dict()
    mixers = sum(tensor.numel() for name, tensor in tensors.items() if ".mamba2." in name)
    assert plans["align"]["memory_optimizer"] == 8 * mixers
    total = sum(tensor.numel() for name, tensor in tensors.items() if "embed" not in name)
    assert plans["ternary"]["memory_optimizer"] == 8 * total
    shown = invoke(qat.train.cli.main, *args).stdout
    assert "[align]\n" in shown
    assert "all stages" in shown


def test_rates_of_mixers_and_the_rest(folders):
    model = load_model(folders / "hybrid")
    recipe = Recipe(rest_lr=0.1, freeze_embedding=True, weight_decay=0.3)
    freeze(model, recipe)
    groups = make_optimizer(model, recipe).param_groups
    names = {p: name for name, p in model.named_parameters()}
    for group in groups:
        for p in group["params"]:
            assert (group["share"] == 1.0) is (".mamba2." in names[p])
            assert (group["weight_decay"] == 0.3) is (p.ndim == 2)
    assert sum(len(group["params"]) for group in groups) == len(names) - 1  # without the embedding
    with pytest.raises(UsageError, match="the model has none"):
        freeze(load_model(folders / "teacher"), Recipe(rest_lr=0.0))


def test_what_does_not_fit_is_refused(folders, corpus, tmp_path):
    args = [
        "--teacher",
        folders / "teacher",
        "--student",
        folders / "hybrid",
        "--data",
        corpus,
        "--out",
        tmp_path / "x",
    ]
    for more, message in (
        (["--recipe", "demo-cpu"], "has no stage"),
        ([], "the stages with --recipe"),
        (["--plan"], "the stages with --recipe"),
    ):
        result = invoke(qat.train.cli.main, *args, *more)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    with pytest.raises(UsageError, match="objective is 'learn'; expected 'predict'"):
        Recipe(objective="learn")
    with pytest.raises(UsageError, match="refit_tokens fits full-precision weights, not ternary"):
        train(Recipe(refit_tokens=9), [corpus], tmp_path / "y", folders / "teacher", student=folders / "hybrid")
    with pytest.raises(UsageError, match="objective needs a teacher"):
        train(Recipe(objective="align", steps=1, seq_len=8), [corpus], tmp_path / "y")
    other = tmp_path / "other"
    torch.manual_seed(0)
    model = LanguageModel(tiny_config())
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    write_checkpoint(other, model.config, tensors, folders / "teacher" / "tokenizer.json")
    with pytest.raises(UsageError, match="the student's blocks is 2, the teacher's 4"):
        train(Recipe(objective="align", weights="dense"), [corpus], tmp_path / "z", folders / "teacher", student=other)
