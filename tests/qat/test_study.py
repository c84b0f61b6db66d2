"""scripts/studies/qat_variants.py: what is scored is kept, and the table is the numbers of the single tools."""

import json
import subprocess
import sys

import pytest

from qat.evaluate import evaluate
from qat.recipe import Recipe
from qat.train.training import train
from tmexport.checkpoint import open_checkpoint


def study(teacher, corpus, held_out, out, *flags):
    command = [
        sys.executable,
        "scripts/studies/qat_variants.py",
        "--teacher",
        teacher,
        "--data",
        corpus,
        "--held-out",
        held_out,
    ]
    command += ["--out", out, "--seeds", 2, "--steps", 2, "--sequences", 2, "--threads", 1, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)


def test_study_keeps_scores_and_extends_the_table(corpus, tmp_path):
    teacher, out, held_out = tmp_path / "teacher", tmp_path / "study", tmp_path / "held.txt"
    held_out.write_text("The state of the Union is strong, and our debts are paid.")
    small = {"d_model": 256, "n_layer": 1, "d_state": 16, "vocab_size": 300, "steps": 3, "seq_len": 64, "threads": 1}
    train(Recipe(**small, batch_size=4, lr=1e-2), [corpus], teacher)
    done = study(teacher, corpus, held_out, out, "--only", "QAT 0.5/0.5", "--only", "GPTQ-style")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    assert [(name, len(values)) for name, values in scores.items()] == [
        ("teacher", 1),
        ("round to nearest, group 256", 1),
        ("round to nearest, group 128", 1),
        ("round to nearest, group 64", 1),
        ("GPTQ-style", 2),
        ("QAT 0.5/0.5", 2),
    ]
    for seed in (0, 1):
        wanted = evaluate(out / f"QAT-0.5-0.5-{seed}", [held_out]).bits_per_byte
        assert scores["QAT 0.5/0.5"][seed] == pytest.approx(wanted, rel=1e-6)
    assert scores["GPTQ-style"][0] != scores["GPTQ-style"][1]  # the seed picks the calibration text
    top, bottom = scores["round to nearest, group 256"][0], scores["teacher"][0]
    middle = sum(scores["GPTQ-style"]) / 2
    table = (out / "table.md").read_text().splitlines()
    (row,) = [line for line in table if "GPTQ-style" in line]
    assert row.startswith(f"| GPTQ-style | 2 | {middle:.4f} ± ")
    assert f"| {(top - middle) / (top - bottom):.0%} |" in row
    student = open_checkpoint(out / "QAT-0.5-0.5-0")
    codes = [student.codes(f"backbone.layers.0.mixer.{name}_proj.weight").codes for name in ("in", "out")]
    kept = json.loads((out / "scores" / "QAT-0.5-0.5-0.json").read_text())
    assert kept["zero_ratio"] == pytest.approx(sum((c == 0).mean() for c in codes) / 2)

    files = [*(out / "scores").glob("*.json"), out / "QAT-0.5-0.5-0" / "model.safetensors"]
    before = [file.stat().st_mtime_ns for file in files]
    again = study(teacher, corpus, held_out, out, "--only", "sigma-delta")
    assert again.returncode == 0, again.stderr
    assert [file.stat().st_mtime_ns for file in files] == before
    extended = json.loads(again.stdout.splitlines()[-1])
    assert len(extended.pop("sigma-delta")) == 1
    assert extended == scores

    wrong = study(teacher, corpus, held_out, out, "--only", "magic")
    assert wrong.returncode == 2
    assert "--only 'magic' is not known" in wrong.stderr
