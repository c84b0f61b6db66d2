"""scripts/demo/demo.py from end to end at its tiny scale, once: what it prints is what is in the files."""

import json
import lzma
import re
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from gguf import GGUFReader
from matplotlib import image
from rich.console import Console
from safetensors.numpy import load_file

from scripts.demo.report import first_difference, recovery_line, table
from tests.demo.running import ROOT, run_demo

MODELS = ("teacher", "rtn", "student")


@pytest.fixture(scope="module")
def results(demo):
    assert demo.code == 0, demo.stdout + demo.stderr
    return json.loads((demo.out / "results.json").read_text(encoding="utf-8"))


def test_last_line_is_a_summary(demo, results):
    assert demo.last_line["results"] == str(demo.out / "results.json")
    assert demo.last_line["recovery_percent"] == results["recovery_percent"]


def test_recovery_is_the_share_of_the_lost_bits(demo, results):
    bits = {
        model: json.loads((demo.out / "steps" / f"evaluate-{model}.out.json").read_text())["bits_per_byte"]
        for model in MODELS
    }
    assert demo.last_line["bits_per_byte"] == bits
    lost, still_lost = bits["rtn"] - bits["teacher"], bits["student"] - bits["teacher"]
    assert results["recovery_percent"] == pytest.approx(100 * (1 - still_lost / lost))
    assert recovery_line(results) in demo.stdout


def test_zero_ratios_are_those_of_the_stored_codes(demo, results):
    for model in ("rtn", "student"):
        tensors = load_file(demo.out / model / "model.safetensors")
        packed = np.concatenate([t.ravel() for name, t in tensors.items() if name.endswith(".codes")])
        two_bit = np.stack([(packed >> shift) & 3 for shift in (0, 2, 4, 6)])
        assert results["models"][model]["zero_ratio"] == pytest.approx((two_bit == 1).mean())
    assert results["models"]["teacher"]["zero_ratio"] is None


def test_files_are_what_the_table_says(demo, results):
    for model, wanted in zip(MODELS, ("F16", "TQ1_0", "TQ1_0"), strict=True):
        path = demo.out / f"{model}.gguf"
        assert results["models"][model]["type"] == wanted
        assert results["models"][model]["gguf_bytes"] == path.stat().st_size
        types = {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}
        assert types["blk.0.ssm_in.weight"] == types["blk.0.ssm_out.weight"] == wanted
        assert f"{path.stat().st_size / 1e6:.2f}" in demo.stdout
    assert results["models"]["student"]["verified_codes"] == 4 * (256 * (1024 + 128 + 8) + 512 * 256)


def test_both_runtimes_ran_every_file_and_agree_at_the_start(results):
    for model in results["models"].values():
        ours, stock = model["runtime_ref"], model["llama_cpp"]
        assert len(ours["tokens"]) == len(stock["tokens"]) == len(stock["margins"]) == 8
        assert min(ours["tokens_per_second"], stock["tokens_per_second"]) > 0
        assert ours["tokens"][0] == stock["tokens"][0]


def test_the_file_scores_as_the_trained_model_does(results):
    student = results["models"]["student"]
    assert student["runtime_ref"]["bits_per_byte"] == pytest.approx(student["bits_per_byte"], abs=1e-3)


def test_picture_is_a_picture(demo):
    pixels = image.imread(demo.out / "curves.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


def test_closing_list_names_every_file_with_a_phrase(demo):
    listed = [re.match(r"(\S+) +[\d.]+ [kM]B  \S", line) for line in demo.stdout.split("\n")]
    names = {match[1] for match in listed if match}
    for path in demo.out.rglob("*"):
        if path.is_file():
            relative = path.relative_to(demo.out)
            assert {relative.as_posix(), f"{relative.parent.as_posix()}/"} & names, f"{relative} is not listed"


def test_commands_shown_are_the_documented_ones(demo):
    shown = [line[2:] for line in demo.stdout.split("\n") if line.startswith("$ ")]
    heads = ["python -m qat.ptq rtn", "python -m qat.train --teacher", "python -m qat.train --teacher"]
    heads += ["python -m qat.evaluate"] * 4 + ["tmexport gguf"] * 3 + ["tmexport verify", "tmexport inspect"] * 3
    heads += ["python -m runtime_ref.perplexity", "python -m runtime_ref.generate"]
    heads += [
        "python -m runtime_ref.generate",
        "python -m runtime_ref.bench",
        "python scripts/peers/run_llamacpp.py",
    ] * 3
    assert [command[: len(head)] for command, head in zip(shown, heads, strict=True)] == heads


def test_second_run_reuses_and_mends(demo, tmp_path):
    """Everything is reused but the file that was damaged, and what depends on it."""
    copy = tmp_path / "demo_out"
    shutil.copytree(demo.out, copy)
    # The commands name the folder, so the copy takes the original's place for a moment.
    kept = demo.out.rename(demo.out.with_name("kept"))
    try:
        copy.rename(demo.out)
        (demo.out / "teacher" / "config.json").unlink()  # comes back as it was
        damaged = bytearray((demo.out / "student.gguf").read_bytes())
        damaged[-1] ^= 1
        (demo.out / "student.gguf").write_bytes(damaged)
        again = run_demo(demo.out)
        assert again.code == 0, again.stdout + again.stderr
        lines = again.stdout.split("\n")
        done = [lines[i - 1].split()[1:] for i, line in enumerate(lines) if "done in" in line]
        assert [words[1] for words in done] == ["gguf"]
        assert again.stdout.count("unchanged, reused") == 26
        assert (demo.out / "student.gguf").read_bytes() == (kept / "student.gguf").read_bytes()
    finally:
        shutil.rmtree(demo.out)
        kept.rename(demo.out)


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "thesis.txt").write_text("years of work")
    refused = run_demo(tmp_path)
    assert refused.code == 2
    assert refused.stderr.count("\n") == 1
    assert "was not made by this demo" in refused.stderr
    assert (tmp_path / "teacher" / "thesis.txt").read_text() == "years of work"


def test_file_that_llamacpp_refuses_is_one_line_with_its_reason(demo, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes((demo.out / "student.gguf").read_bytes()[:-5000])
    command = [sys.executable, "scripts/peers/run_llamacpp.py", str(broken), "--prompt", "a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "llama.cpp does not load it: " in done.stderr
    assert "not within the file bounds" in done.stderr


def _results(ours, stock, margins):
    runtime = {"tokens_per_second": 1234.5, "text": ""}
    model = {
        "label": "x",
        "bits_per_byte": 1.5,
        "zero_ratio": 0.3,
        "type": "TQ1_0",
        "gguf_bytes": 12_345_678,
        "runtime_ref": {"tokens": ours, **runtime},
        "llama_cpp": {"tokens": stock, "margins": margins, **runtime},
    }
    return {"recovery_percent": 91.26, "control": 1.25, "models": {"student": model}}


def test_first_difference_counts_from_the_start():
    assert first_difference(_results([1, 2, 3], [1, 2, 3], [1.0] * 3)) == "All 3 tokens are the same."
    line = first_difference(_results([1, 2, 3, 4], [1, 2, 9, 4], [1.0, 1.0, 0.0031, 1.0]))
    assert line.startswith("The first 2 of 4 tokens are the same")
    assert "0.0031 apart" in line
    assert first_difference(_results([1, 2, 3], [1, 2], [1.0, 1.0])).startswith("The first 2 of 3")


@pytest.mark.parametrize(
    ("recovery", "words"),
    [(91.26, "made good 91.3 %"), (137.04, "all that rounding lost, .*137 %"), (None, "lost nothing")],
)
def test_recovery_in_words(recovery, words):
    assert re.search(words, recovery_line({"recovery_percent": recovery}))


def test_table_fits_eighty_columns():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(_results([1], [1], [1.0])))
    text = console.export_text()
    assert "…" not in text
    for value in ("1.500", "0.300", "TQ1_0", "12.35", "1,234", "teacher, longer", "1.250", "91.3 %"):
        assert value in text


def test_from_scratch_trains_the_teacher_first(tmp_path):
    demo = run_demo(tmp_path / "out", "--from-scratch")
    assert demo.code == 0, demo.stdout + demo.stderr
    assert "$ python -m qat.train --from-scratch" in demo.stdout
    assert len((demo.out / "teacher" / "metrics.jsonl").read_text().splitlines()) == 6
    assert image.imread(demo.out / "curves.png").shape[1] > 800


def test_the_shipped_teacher_is_the_one_whose_training_is_kept():
    """Its files are small, and the log beside it is of the recipe beside it."""
    folder = ROOT / "scripts" / "demo" / "teacher"
    assert sum((folder / name).stat().st_size for name in ("config.json", "tokenizer.json", "model.safetensors")) < 6e6
    lines = lzma.decompress((folder / "metrics.jsonl.xz").read_bytes()).decode().splitlines()
    recipe = tomllib.loads((folder / "recipe.toml").read_text())["teacher"]
    assert len(lines) == recipe["steps"]
    assert json.loads(lines[-1])["tokens"] == recipe["steps"] * recipe["batch_size"] * recipe["seq_len"] == 8_192_000
