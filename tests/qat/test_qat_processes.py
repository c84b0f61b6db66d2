"""Two CPU processes over gloo train as one process with the same total batch."""

import json
import subprocess
import sys

import numpy as np
import pytest

from qat.recipe import Recipe
from qat.train import train
from tmexport.checkpoint import open_checkpoint, projection_names


def test_two_processes_equal_one(corpus, tmp_path):
    dimensions = {"d_model": 64, "n_layer": 1, "d_state": 16, "headdim": 32, "vocab_size": 300, "seq_len": 32}
    train(Recipe(**dimensions, steps=10, batch_size=4, lr=1e-2, threads=1), [corpus], tmp_path / "teacher")
    settings = {"group_size": 64, "steps": 12, "seq_len": 32, "batch_size": 8, "lr": 3e-3, "threads": 1, "log_every": 4}
    train(Recipe(**settings), [corpus], tmp_path / "one", tmp_path / "teacher", held_out=[corpus])
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qat.train", "--json", *flags]
    folders = ["--teacher", tmp_path / "teacher", "--data", corpus, "--held-out", corpus, "--out", tmp_path / "two"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12  # one object, from one of the two
    curves = []
    for name in ("one", "two"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    assert len(curves[0]) == len(curves[1]) == 12
    for one, two in zip(*curves, strict=True):
        for key in ("loss", "cross_entropy", "kl", "grad_norm"):
            assert two[key] == pytest.approx(one[key], abs=1e-4), (one["step"], key)
    assert curves[1][-1]["held_out_bits_per_byte"] == pytest.approx(curves[0][-1]["held_out_bits_per_byte"], abs=1e-4)
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    for name in projection_names(one.config):
        assert np.mean(one.ternary(name).codes == two.ternary(name).codes) > 0.999, name
