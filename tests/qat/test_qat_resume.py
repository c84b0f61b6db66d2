"""Runs that stop and go on: the same bits as without the stop, and never a mixture of two runs."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from qat.recipe import Recipe
from qat.train.hooks import Hook
from qat.train.training import train
from tests.qat.tiny import STUDENT, TINY, curve
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import UsageError


@pytest.mark.parametrize("stop_after", [7, 9])
def test_resume_is_exact(teacher, corpus, tmp_path, stop_after):
    """Interrupted in the middle (at a checkpoint or not), the run ends with the same curve and the same bits."""
    train(STUDENT, [corpus], tmp_path / "whole", teacher, held_out=[corpus])

    class PressCtrlC(Hook):
        def after_step(self, training):
            if training.step == stop_after:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(STUDENT, [corpus], tmp_path / "parts", teacher, held_out=[corpus], hooks=[PressCtrlC()])
    assert len(curve(tmp_path / "parts")) == stop_after + 1  # the step in progress is finished
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train(STUDENT, [corpus], tmp_path / "parts", teacher, held_out=[corpus], resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "recipe.toml"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_resume_with_other_inputs_is_refused(teacher, corpus, tmp_path):
    """Other text, tokenizer or teacher: one line that names it, and nothing in the folder changes."""
    run, other = tmp_path / "run", tmp_path / "other.jsonl"
    short = Recipe(**{**TINY, "group_size": 64, "steps": 4})
    train(short, [corpus], run, teacher)
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    other.write_text("".join(lines[:-1]), encoding="utf-8")
    raw = json.loads((teacher / "tokenizer.json").read_text())
    raw["model"]["merges"].pop()
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps(raw))
    second = tmp_path / "second"
    train(Recipe(**{**TINY, "seed": 1, "steps": 2}), [corpus], second)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "cache" not in path.parts}
    for message, data, source, given in (
        ("was made with another --data", other, teacher, None),
        ("was made with another --tokenizer", corpus, teacher, tokenizer),
        ("was made with another --teacher", corpus, second, teacher / "tokenizer.json"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            train(short, [data], run, source, tokenizer=given, resume=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="is not the tokenizer of the run in"):
        train(Recipe(**{**TINY, "seed": 1, "steps": 2}), [corpus], second, tokenizer=tokenizer, resume=True)
    with pytest.raises(UsageError, match="was made with lr = 0.01, now it is 0.5"):
        train(Recipe(**{**TINY, "group_size": 64, "steps": 4, "lr": 0.5}), [corpus], run, teacher, resume=True)
    assert {path: path.read_bytes() for path in before} == before
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(corpus.read_bytes())  # the same text elsewhere is the same text
    assert train(short, [moved], run, teacher, resume=True)["steps"] == 4


def test_tensorboard_holds_the_metrics_once(teacher, corpus, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe(**{**TINY, "group_size": 64, "steps": 8, "tensorboard": True, "save_every": 3})

    class PowerCut(Hook):
        def after_step(self, training):
            if training.step == 5:  # after the checkpoint of step 3: steps 4 and 5 are done twice
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(recipe, [corpus], tmp_path, teacher, hooks=[PowerCut()])
    train(recipe, [corpus], tmp_path, teacher, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    rows = curve(tmp_path)
    for key in ("loss", "kl", "lr", "grad_norm", "zero_ratio"):
        wanted = [(row["step"], pytest.approx(row[key])) for row in rows if key in row]
        assert [(event.step, event.value) for event in events.Scalars(key)] == wanted, key
    last = rows[-1]["zero_ratios"]
    assert len(last) == 2
    for module, ratio in last.items():
        assert events.Scalars(f"zero_ratio/{module}")[-1].value == pytest.approx(ratio)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="--tensorboard needs tensorboard; install it with: pip install tensorboard"):
        train(recipe, [corpus], tmp_path / "without", teacher)


def test_resume_drops_steps_after_the_checkpoint(teacher, corpus, tmp_path):
    """A crash between checkpoints: entries of steps that are done again appear once."""
    train(STUDENT, [corpus], tmp_path, teacher)
    whole = curve(tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)
    assert state["step"] == 30
    train(STUDENT, [corpus], tmp_path, teacher, resume=True)  # complete already: nothing is done again
    assert curve(tmp_path) == whole


def test_minutes_stop_early(teacher, corpus, tmp_path):
    summary = train(Recipe(**{**TINY, "group_size": 64, "minutes": 1e-6}), [corpus], tmp_path, teacher)
    assert (summary["steps"], summary["stopped_by"]) == (1, "minutes")
    assert open_checkpoint(tmp_path).group_size == 64


def test_refuses_to_overwrite_or_mix_runs(teacher, corpus, tmp_path):
    train(STUDENT, [corpus], tmp_path, teacher)
    with pytest.raises(UsageError, match="already holds a run; continue it with --resume"):
        train(STUDENT, [corpus], tmp_path, teacher)
    changed = Recipe(**{**TINY, "group_size": 64, "lr": 1e-4, "eval_every": 10, "weight_decay": 0.0})
    with pytest.raises(UsageError, match="lr = 0.003, now it is 0.0001"):
        train(changed, [corpus], tmp_path, teacher, resume=True)
    (tmp_path / "checkpoints" / "latest.pt").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="is damaged or not a checkpoint"):
        train(STUDENT, [corpus], tmp_path, teacher, resume=True)


def test_ctrl_c_exits_130(teacher, corpus, tmp_path):
    arguments = ["--teacher", teacher, "--data", corpus, "--out", tmp_path, "--group-size", 64, "--threads", 1]
    arguments += ["--steps", 100000, "--seq-len", 32, "--batch-size", 2]
    process = subprocess.Popen(
        [sys.executable, "-m", "qat.train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(600):
        if metrics.is_file() and metrics.stat().st_size > 0:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    saved = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)
    assert saved["step"] == len(metrics.read_text().splitlines())
