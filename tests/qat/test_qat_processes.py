"""Two CPU processes over gloo train as one process with the same total batch."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from qat.recipe import Recipe
from qat.train.training import train
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import UsageError


def launch(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "qat.train", "--json", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_equal_one(corpus, tmp_path, sharded):
    """With every process holding all weights, and with each holding a part; the latter is also resumed."""
    dimensions = {"d_model": 64, "n_layer": 1, "d_state": 16, "headdim": 32, "vocab_size": 300, "seq_len": 32}
    train(Recipe(**dimensions, steps=10, batch_size=4, lr=1e-2, threads=1), [corpus], tmp_path / "teacher")
    settings = {
        "group_size": 64,
        "steps": 12,
        "seq_len": 32,
        "batch_size": 8,
        "lr": 3e-3,
        "threads": 1,
        "log_every": 4,
        "clip": 0.1,
    }
    train(Recipe(**settings), [corpus], tmp_path / "one", tmp_path / "teacher", held_out=[corpus])
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    folders = ["--teacher", tmp_path / "teacher", "--data", corpus, "--held-out", corpus, "--out", tmp_path / "two"]
    if sharded:
        flags.append("--shard")
        stopped = launch(*folders, *flags, "--save-every", 5, "--minutes", 1e-6)  # one step, then it is late
        assert stopped.returncode == 0, stopped.stderr
        assert json.loads(stopped.stdout)["stopped_by"] == "minutes"
        saved = torch.load(tmp_path / "two" / "checkpoints" / "latest.pt", weights_only=True)
        assert saved["step"] == 1
        first = saved["optimizer"]["state"][0]["exp_avg"]
        assert first.shape == saved["model"]["backbone.embeddings.weight"].shape  # whole, not a part
        flags.append("--resume")
    done = launch(*folders, *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one object, from one of the two
    assert (summary["steps"], summary["processes"]) == (12, 2)
    curves = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    assert len(curves[0]) == len(curves[1]) == 12
    assert min(entry["grad_norm"] for entry in curves[0]) > 0.1  # all were clipped
    for one, two in zip(*curves, strict=True):
        for key in ("loss", "cross_entropy", "kl", "grad_norm"):
            assert two[key] == pytest.approx(one[key], abs=1e-4), (one["step"], key)
    assert curves[1][-1]["held_out_bits_per_byte"] == pytest.approx(curves[0][-1]["held_out_bits_per_byte"], abs=1e-4)
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    for name in one.config.projections:
        assert np.mean(one.codes(name).codes == two.codes(name).codes) > 0.999, name


def test_sharding_needs_several_processes(corpus, tmp_path):
    small = {"d_model": 64, "n_layer": 1, "d_state": 16, "headdim": 32, "vocab_size": 300, "seq_len": 32}
    with pytest.raises(UsageError, match="--shard needs several processes"):
        train(Recipe(**small, shard=True), [corpus], tmp_path)
