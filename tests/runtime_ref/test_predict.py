"""The speed on paper: the formula by hand, its limits, and the script around it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench import predict
from runtime_ref.bench.predict import Speeds, decode_seconds, prefill_seconds, work_of, work_of_file
from runtime_ref.bench.rates import ternary_rate
from runtime_ref.gguf_source import gguf_source
from tests.models import SMALL, write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.gguf.export import plan_export
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model
from tmexport.types import GGMLType

BIG = mamba2_model(d_model=2048, n_layer=48, vocab_size=50288)
WORK = work_of(BIG, GGMLType.TQ2_0, GGMLType.Q8_0)
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "predict_speed.py"
NEVER = 1e30  # a speed that costs nothing


def test_the_work_of_the_1_3b_shape_by_hand():
    assert WORK.body_macs == 48 * (8512 * 2048 + 2048 * 4096)
    assert WORK.body_bytes == WORK.body_macs * (2 / 8 + 2 / 256)
    assert WORK.head_bytes == 50288 * 2048 * 34 / 32
    assert WORK.state_elements == 48 * 4096 * 128


@pytest.mark.parametrize(("profile", "width"), [("exact", 4), ("fast", 2), ("compact", 1)])
def test_a_slow_memory_costs_its_bytes(profile, width):
    speeds = Speeds(1e9, NEVER, NEVER)
    moved = WORK.body_bytes + WORK.head_bytes + 2.5 * width * WORK.state_elements
    assert decode_seconds(WORK, profile, speeds) == pytest.approx(moved / 1e9 + predict.CALL)
    shared = (moved / 1e9 + predict.CALL) / predict.CHUNK
    assert prefill_seconds(WORK, profile, speeds) == pytest.approx(shared)


def test_slow_arithmetic_costs_its_products():
    speeds = Speeds(NEVER, 1e9, NEVER)
    head = 50288 * 2048 / 0.45e9
    assert decode_seconds(WORK, "fast", speeds) == pytest.approx(WORK.body_macs / 1e9 + head + predict.CALL)
    assert decode_seconds(WORK, "exact", speeds) == pytest.approx(WORK.body_macs / 0.62e9 + head + predict.CALL)
    shared = (head + predict.CALL) / 64
    assert prefill_seconds(WORK, "fast", speeds) == pytest.approx(WORK.body_macs / 1.5e9 + shared)
    by_tables = replace(speeds, tables=True)
    assert prefill_seconds(WORK, "exact", by_tables) == pytest.approx(WORK.body_macs / 1.25e9 + shared)


def test_a_slow_scan_costs_its_elements():
    small = 48 * (11.6 * 4352 + 5.0 * (2048 + 4096))
    speeds = Speeds(NEVER, NEVER, 1e9)
    assert decode_seconds(WORK, "exact", speeds) == pytest.approx((WORK.state_elements + small) / 1e9 + predict.CALL)
    assert decode_seconds(WORK, "fast", speeds) == pytest.approx(
        (WORK.state_elements / 0.7 + small) / 1e9 + predict.CALL
    )


def test_more_threads_help_only_arithmetic():
    slow = Speeds(1e9, NEVER, NEVER)
    barriers = 6 * 48 * 3e-6
    assert decode_seconds(WORK, "fast", replace(slow, threads=4)) == pytest.approx(
        decode_seconds(WORK, "fast", slow) + barriers
    )
    weak = Speeds(NEVER, 1e9, 1e9)
    alone, four = (decode_seconds(WORK, "fast", replace(weak, threads=n)) for n in (1, 4))
    assert four == pytest.approx((alone - predict.CALL) / 4 + predict.CALL + barriers)


def test_a_file_says_its_work(tmp_path):
    for kind, group in (("tq1_0", 256), ("q2_0", 64)):
        checkpoint = open_checkpoint(write_small(tmp_path / kind, group_size=group))
        plan_export(checkpoint, kind, "q8_0").write(tmp_path / "m.gguf", lambda t: None)
        work = work_of_file(open_gguf(tmp_path / "m.gguf"))
        source = gguf_source(tmp_path / "m.gguf")
        sizes = {
            name: sum(array.nbytes for array in source.packed(name))
            for name, info in open_gguf(tmp_path / "m.gguf").tensors.items()
            if len(info.shape) == 2 and name.endswith(("ssm_in.weight", "ssm_out.weight", "output.weight"))
        }
        assert work.head_bytes == sizes.pop("output.weight")
        assert work.body_bytes == sum(sizes.values())
        assert work.config.d_model == SMALL.d_model


def test_the_rate_in_cache_is_a_rate():
    assert 1e6 < ternary_rate("fast", 1) < 1e13  # from a slow emulator to beyond any core


def run(*args):
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, check=False)


def test_the_script_predicts_what_the_formula_says():
    done = run("--size", "1.3b", "--bandwidth", "9", "--gmacs", "18", "--elements", "0.7", "--threads", "4")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    speeds = Speeds(9e9, 18e9, 0.7e9, 4)
    for row in rows:
        assert row["decode"] == pytest.approx(1 / decode_seconds(WORK, row["profile"], speeds))
        assert row["prefill"] == pytest.approx(1 / prefill_seconds(WORK, row["profile"], speeds))
    assert [row["profile"] for row in rows] == list(PRESETS)


def test_the_table_in_the_documentation_is_the_script_s():
    rows = json.loads(run("--boards").stdout.splitlines()[-1])["rows"]
    text = (SCRIPT.parents[2] / "docs" / "edge.md").read_text(encoding="utf-8")
    for machine in dict.fromkeys(row["machine"] for row in rows):
        cells = []
        for size in ("130m", "370m", "1.3b"):
            found = [row for row in rows if (row["machine"], row["model"]) == (machine, size)]
            for test in ("decode", "prefill"):
                cells.append(
                    " / ".join(f"{row[test]:.0f}" if row[test] >= 9.95 else f"{row[test]:.1f}" for row in found)
                )
        assert f"| {machine} | {' | '.join(cells)} |" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "choose one"),
        (["--boards", "--measure"], "choose one"),
        (["--bandwidth", "9"], "belong together"),
        (["--bandwidth", "0", "--gmacs", "1"], "0"),
        (["--check"], "name at least one GGUF file"),
        (["--boards", "none.gguf"], "none.gguf: cannot be read"),
        (["--measure", "--threads", "two"], "'two' is not a list of thread counts"),
    ],
)
def test_wrong_use_is_told(args, message):
    done = run(*args)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
