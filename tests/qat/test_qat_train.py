"""Training end to end on a tiny model: results, and the ways it must refuse."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import qat.evaluate
import qat.ptq.cli
import qat.train.cli
from qat.errors import TrainingError
from qat.evaluate import end_of_text_id, evaluate
from qat.model import load_model
from qat.ptq.making import make
from qat.recipe import Recipe, load_recipe
from qat.train.hooks import find_collapse
from qat.train.training import train
from tests.models import train_tokenizer
from tests.qat.tiny import STUDENT, TINY, curve
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.app import outcome
from tmexport.errors import CheckpointError, TextError, TokenizerError, UsageError
from tmexport.types.ternary import quantize_absmean


def test_teacher_learns_and_is_a_checkpoint(teacher, corpus):
    rows = curve(teacher)
    assert [row["step"] for row in rows] == list(range(30))
    assert rows[0]["loss"] == pytest.approx(math.log(300), abs=0.3)  # a uniform guess at first
    assert rows[-1]["loss"] < 4.0
    assert (teacher / "curves.png").read_bytes().startswith(b"\x89PNG")
    checkpoint = open_checkpoint(teacher)
    assert checkpoint.group_size is None
    assert (checkpoint.config.eos_token_id, checkpoint.config.vocab_size) == (0, 300)
    saved = load_recipe(str(teacher / "recipe.toml"), "teacher", {})
    assert saved == Recipe(**TINY)


def test_evaluate_by_hand(teacher, corpus, tmp_path):
    text = "The union of the States. Ünion — 漢\n"
    path = tmp_path / "one.txt"
    path.write_text(text, encoding="utf-8")
    score = evaluate(teacher, [path])
    ids = [0, *Tokenizer.from_file(str(teacher / "tokenizer.json")).encode(text).ids]
    with torch.no_grad():
        log_p = load_model(teacher)(torch.tensor([ids[:-1]])).double().log_softmax(-1)[0]
    nats = -sum(log_p[i, token].item() for i, token in enumerate(ids[1:]))
    assert score.tokens == len(ids) - 1
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / score.tokens), rel=1e-5)


@pytest.mark.parametrize("tokens", [10**6, 40], ids=["whole", "first tokens"])
def test_a_marker_inside_a_text_is_scored_in_training_as_in_evaluation(teacher, corpus, tmp_path, tokens):
    text = corpus.read_text(encoding="utf-8")[:600]
    known = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    texts = [f"{text[:12]}<|endoftext|>{text[12:400]}", text[400:]]
    held_out, scored = tmp_path / "held.jsonl", tmp_path / "scored.jsonl"
    held_out.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    share = [known.encode(t, add_special_tokens=False).ids[: max(1, tokens // 2 - 1)] for t in texts]
    cut = [known.decode(ids, skip_special_tokens=False) for ids in share]
    scored.write_text("".join(json.dumps({"text": t}) + "\n" for t in cut))
    assert "<|endoftext|>" in cut[0]
    assert [
        known.encode(t, add_special_tokens=False).ids for t in cut
    ] == share  # so that the texts stand for these tokens
    recipe = Recipe(**{**TINY, "steps": 2, "eval_every": 2, "group_size": 64, "eval_tokens": tokens})
    summary = train(recipe, [corpus], tmp_path / "out", teacher, held_out=[held_out])
    assert summary["held_out_bits_per_byte"] == pytest.approx(
        evaluate(tmp_path / "out", [scored]).bits_per_byte, rel=1e-6
    )


def test_qat_beats_rounding(teacher, corpus, tmp_path):
    summary = train(STUDENT, [corpus], tmp_path / "qat", teacher, held_out=[corpus])
    make("rtn", teacher, tmp_path / "rtn", group_size=64)
    scores = {
        name: evaluate(path, [corpus]).bits_per_byte
        for name, path in (("teacher", teacher), ("rtn", tmp_path / "rtn"), ("qat", tmp_path / "qat"))
    }
    assert scores["qat"] < scores["rtn"]
    assert scores["teacher"] < scores["rtn"]
    assert summary["held_out_bits_per_byte"] <= scores["qat"] + 1e-3  # the lowest of all evaluations
    assert 0.1 < summary["zero_ratio"] < 0.6
    checkpoint = open_checkpoint(tmp_path / "qat")
    assert checkpoint.group_size == 64
    last = torch.load(tmp_path / "qat" / "checkpoints" / "latest.pt", weights_only=True)["model"]
    for name in checkpoint.config.projections:
        latent = last[name.replace(".weight", ".parametrizations.weight.original")].numpy()
        assert np.array_equal(checkpoint.codes(name).codes, quantize_absmean(latent, 64).codes)


def test_rtn_is_absmean(teacher, tmp_path):
    make("rtn", teacher, tmp_path, group_size=64)
    source, rounded = open_checkpoint(teacher), open_checkpoint(tmp_path)
    for name in source.names:
        wanted = (
            quantize_absmean(source.dense(name), 64).dense() if name.endswith("_proj.weight") else source.dense(name)
        )
        assert np.array_equal(rounded.dense(name), wanted), name


def test_parts_of_a_batch_and_recomputed_layers_change_nothing(teacher, corpus, tmp_path):
    train(STUDENT, [corpus], tmp_path / "plain", teacher)
    settings = {**TINY, "group_size": 64, "lr": 3e-3, "eval_every": 10, "weight_decay": 0.0}
    train(Recipe(**settings, checkpoint_activations=True), [corpus], tmp_path / "recomputed", teacher)
    assert (tmp_path / "recomputed" / "model.safetensors").read_bytes() == (
        tmp_path / "plain" / "model.safetensors"
    ).read_bytes()
    train(Recipe(**settings, accumulate=4), [corpus], tmp_path / "parts", teacher)
    for a, b in zip(curve(tmp_path / "plain"), curve(tmp_path / "parts"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_bfloat16_computes_with_fp32_latent_weights(teacher, corpus, tmp_path):
    settings = {**TINY, "group_size": 64, "lr": 3e-3, "eval_every": 10, "weight_decay": 0.0}
    train(STUDENT, [corpus], tmp_path / "full", teacher)
    train(Recipe(**settings, dtype="bfloat16"), [corpus], tmp_path / "half", teacher)
    full, half = curve(tmp_path / "full"), curve(tmp_path / "half")
    assert half[0]["loss"] != full[0]["loss"]
    for a, b in zip(full, half, strict=True):
        assert b["cross_entropy"] == pytest.approx(a["cross_entropy"], abs=0.05)
    state = torch.load(tmp_path / "half" / "checkpoints" / "latest.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    name = "backbone.layers.0.mixer.in_proj.parametrizations.weight.original"
    assert not torch.equal(state[name], state[name].bfloat16().float())  # not a bf16 number in disguise


def test_teacher_asked_once(teacher, corpus, tmp_path):
    """With all tokens kept the curve is that of a teacher asked at every step; a rerun uses the file as it is."""
    settings = {**TINY, "group_size": 64, "lr": 3e-3, "eval_every": 10, "weight_decay": 0.0}
    train(STUDENT, [corpus], tmp_path / "asked", teacher)
    cache = tmp_path / "cache"
    train(Recipe(**settings, teacher_top_k=300), [corpus], tmp_path / "kept", teacher, cache=cache)
    for step, (a, b) in enumerate(zip(curve(tmp_path / "asked"), curve(tmp_path / "kept"), strict=True)):
        # fp16 log-probabilities; after some steps a code or two round the other way, and the curves part by more
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-3 if step < 10 else 1e-2)
    (file,) = cache.glob("teacher-*")
    before = file.stat().st_mtime_ns
    train(Recipe(**{**settings, "lr": 1e-3}, teacher_top_k=300), [corpus], tmp_path / "again", teacher, cache=cache)
    assert [f.stat().st_mtime_ns for f in cache.glob("teacher-*")] == [before]
    train(Recipe(**settings, teacher_top_k=300, accumulate=2), [corpus], tmp_path / "parts", teacher, cache=cache)
    for a, b in zip(curve(tmp_path / "kept"), curve(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-4)


def test_aligning_layers(teacher, corpus, tmp_path):
    """The warm-up lowers the distance between the layers, leaves head and embedding alone, and then training goes on."""
    settings = {**TINY, "group_size": 64, "lr": 3e-3, "warmup": 0.0, "final_lr": 1.0, "weight_decay": 0.0}
    train(Recipe(**settings, align_steps=30), [corpus], tmp_path / "only", teacher)
    rows = curve(tmp_path / "only")
    assert all("cross_entropy" not in row for row in rows)
    assert np.mean([row["loss"] for row in rows[-5:]]) < 0.7 * rows[0]["loss"]
    only, source = open_checkpoint(tmp_path / "only"), open_checkpoint(teacher)
    for name in ("backbone.embeddings.weight", "backbone.norm_f.weight"):
        assert np.array_equal(only.dense(name), source.dense(name))
    train(Recipe(**settings, align_steps=10), [corpus], tmp_path / "both", teacher)
    rows = curve(tmp_path / "both")
    assert ["cross_entropy" in row for row in rows] == [False] * 10 + [True] * 20
    with pytest.raises(UsageError, match="align_steps needs a teacher"):
        train(Recipe(**settings, align_steps=10), [corpus], tmp_path / "none")


def test_collapse_stops_the_run_and_is_named(teacher, corpus, tmp_path):
    """A limit below the usual zero ratio makes the monitor speak; the state is saved and can go on."""
    sensitive = Recipe(**{**TINY, "group_size": 64, "log_every": 1, "collapse_ratio": 0.01})
    with pytest.raises(
        TrainingError, match=r"step \d+: the zero ratio of backbone.layers.0.mixer.\w+_proj collapsed: .* -> "
    ):
        train(sensitive, [corpus], tmp_path, teacher)
    done = len(curve(tmp_path))
    assert torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["step"] == done < 30
    tolerant = Recipe(**{**TINY, "group_size": 64, "log_every": 1, "collapse_ratio": 0.01, "allow_collapse": True})
    assert train(tolerant, [corpus], tmp_path, teacher, resume=True)["steps"] == 30


def test_find_collapse():
    assert find_collapse({"a": 0.3, "b": 0.6}, {"a": 0.4, "b": 0.65}, 0.7) is None
    assert (
        find_collapse({"a": 0.3, "b": 0.69}, {"a": 0.3, "b": 0.71}, 0.7)
        == "b collapsed: 69.0% -> 71.0%, above 70% and rising"
    )
    assert find_collapse({"a": 0.9}, {"a": 0.85}, 0.7) is None  # recovering
    assert find_collapse({}, {"a": 0.9}, 0.7) is None  # a first look has no direction


def test_loss_that_is_not_finite_stops(teacher, corpus, tmp_path):
    with pytest.raises(TrainingError, match=r"step \d+: the loss is .*(nan|inf).*; lower --lr"):
        train(Recipe(**{**TINY, "group_size": 64, "lr": 1e30, "clip": 0.0}), [corpus], tmp_path, teacher)
    assert not (tmp_path / "model.safetensors").exists()


def test_vocabulary_of_another_model(teacher, corpus, tmp_path):
    raw = json.loads((teacher / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 300, "content": "<|extra|>"})
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(raw))
    with pytest.raises(TokenizerError, match="up to 300, but the model has 300 embeddings"):
        train(STUDENT, [corpus], tmp_path / "out", teacher, tokenizer=other)


def test_ternary_teacher_and_no_teacher(teacher, corpus, tmp_path):
    make("rtn", teacher, tmp_path / "rtn", group_size=64)
    with pytest.raises(CheckpointError, match="already ternary"):
        train(STUDENT, [corpus], tmp_path / "a", tmp_path / "rtn")
    with pytest.raises(CheckpointError, match="no such folder"):
        train(STUDENT, [corpus], tmp_path / "b", tmp_path / "missing")
    with pytest.raises(UsageError, match="is the teacher's folder"):
        train(STUDENT, [corpus], teacher, teacher, resume=True)
    with pytest.raises(UsageError, match="is the teacher's folder"):
        make("rtn", teacher, teacher, group_size=64)
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(TextError, match="holds no text"):
        train(STUDENT, [empty], tmp_path / "c", teacher)


def test_from_scratch_with_another_end_token(corpus, tmp_path):
    """A tokenizer with </s>: its token stands between documents, in the config and in the file; without the flag it is asked for."""
    raw = json.loads(train_tokenizer(tmp_path / "t.json", 300).read_text())
    end = raw["added_tokens"][0]["id"]
    raw["added_tokens"][0]["content"] = "</s>"
    raw["model"]["vocab"]["</s>"] = raw["model"]["vocab"].pop("<|endoftext|>")
    (tmp_path / "t.json").write_text(json.dumps(raw))
    recipe = Recipe(**TINY | {"steps": 1})
    with pytest.raises(
        UsageError, match=r"has no token '<\|endoftext\|>'; name the one that ends a text with --end-token"
    ):
        train(recipe, [corpus], tmp_path / "a", None, tokenizer=tmp_path / "t.json")
    train(dataclasses.replace(recipe, end_token="</s>"), [corpus], tmp_path / "b", None, tokenizer=tmp_path / "t.json")
    with pytest.raises(UsageError, match="end_token is for a model from scratch"):
        train(dataclasses.replace(recipe, end_token="</s>"), [corpus], tmp_path / "d", tmp_path / "b")
    train(
        dataclasses.replace(recipe, end_token="</s>", vocab_size=300), [corpus], tmp_path / "c", None
    )  # its own tokenizer
    own = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    assert own["added_tokens"][0]["content"] == "</s>"
    assert open_checkpoint(tmp_path / "c").config.eos_token_id == own["added_tokens"][0]["id"]
    made = open_checkpoint(tmp_path / "b").config
    assert (made.eos_token_id, made.bos_token_id) == (end, end)
    assert end_of_text_id(made, tmp_path / "b" / "tokenizer.json") == end


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


def test_commands(teacher, corpus, tmp_path):
    small = ["--steps", 3, "--seq-len", 32, "--batch-size", 2, "--group-size", 64, "--threads", 1]
    done = command("qat.train", "--teacher", teacher, "--data", corpus, "--out", tmp_path / "s", "--json", *small)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["steps"] == 3
    assert "tok/s" in done.stderr
    done = command("qat.evaluate", tmp_path / "s", "--data", corpus, "--json")
    assert json.loads(done.stdout)["bits_per_byte"] == pytest.approx(evaluate(tmp_path / "s", [corpus]).bits_per_byte)


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (qat.train.cli.main, ["--data", "CORPUS"]),
        (qat.train.cli.main, ["--teacher", "TEACHER", "--data", "CORPUS", "--lr", "-1"]),
        (qat.train.cli.main, ["--teacher", "TEACHER", "--data", "CORPUS", "--recipe", "nonsense"]),
        (qat.train.cli.main, ["--teacher", "TEACHER", "--data", "CORPUS", "--steps", "many"]),
        (
            qat.train.cli.main,
            ["--teacher", "TEACHER", "--data", "CORPUS", "--batch-size", "3", "--accumulate", "2"],
        ),
        (qat.ptq.cli.main, ["rtn", "--teacher", "TEACHER", "--group-size", "256"]),  # does not fit a width of 64
        (qat.evaluate.main, ["--data", "CORPUS"]),
    ],
)
def test_wrong_usage_exits_2(teacher, corpus, tmp_path, capsys, command, arguments):
    known = {"TEACHER": str(teacher), "CORPUS": str(corpus)}
    arguments = [known.get(word, word) for word in arguments]
    if command is not qat.evaluate.main:
        arguments += ["--out", str(tmp_path / "x")]
    assert outcome(command, "command", arguments) == 2
    assert capsys.readouterr().err.strip()
    assert not (tmp_path / "x" / "model.safetensors").exists()


@pytest.mark.parametrize("changes", [{"weights": "binary"}, {"weights": "binary", "ternary_embedding": True}], ids=str)
def test_low_bit_of_other_kinds_trains_and_resumes(corpus, tmp_path, changes):
    """Binary weights, and a ternary embedding: better than rounding, the same bits after a stop, codes in the checkpoint."""
    train(Recipe(**{**TINY, "d_model": 128}), [corpus], tmp_path / "teacher")
    settings = {**TINY, "lr": 3e-3, "weight_decay": 0.0, "group_size": 0, **changes}
    for name, minutes in (("whole", 0.0), ("parts", 1e-6)):
        train(Recipe(**settings, minutes=minutes), [corpus], tmp_path / name, tmp_path / "teacher")
    assert len(curve(tmp_path / "parts")) == 1
    train(Recipe(**settings), [corpus], tmp_path / "parts", tmp_path / "teacher", resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]
    make("rtn", tmp_path / "teacher", tmp_path / "rtn", "binary")
    scores = {name: evaluate(tmp_path / name, [corpus]).bits_per_byte for name in ("rtn", "whole")}
    assert scores["whole"] < scores["rtn"]
    found = open_checkpoint(tmp_path / "whole")
    embedding = found.form("backbone.embeddings.weight")
    assert (embedding.kind if embedding else None) == ("ternary" if "ternary_embedding" in changes else None)
    assert {found.form(name).kind for name in found.config.projections} == {"binary"}


def test_dense_weights_train_the_teacher_on(corpus, tmp_path):
    """The control of QAT: the same steps in full precision, from the teacher's weights."""
    train(Recipe(**TINY), [corpus], tmp_path / "teacher")
    settings = {**TINY, "lr": 1e-3, "weights": "dense"}
    train(Recipe(**settings), [corpus], tmp_path / "on", tmp_path / "teacher")
    found = open_checkpoint(tmp_path / "on")
    assert not found.coded
    assert "zero_ratio" not in curve(tmp_path / "on")[-1]
    before, after = (evaluate(tmp_path / name, [corpus]).bits_per_byte for name in ("teacher", "on"))
    assert after < before
    with pytest.raises(UsageError, match="--ternary-embedding goes with --weights ternary or binary"):
        train(Recipe(**settings, ternary_embedding=True), [corpus], tmp_path / "no", tmp_path / "teacher")
