"""`bench --peers` with the peers that are installed here: what it says must follow from what the libraries computed."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench.cli import bench
from runtime_ref.bench.peers import PeerSettings, compare_peers
from runtime_ref.bench.peers.llama import library_of
from runtime_ref.bench.peers.products import by_ggml, by_kernels, by_onnxruntime, problem_of
from tests.models import SMALL, coded_tensors, mixer, train_tokenizer, write_small
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.gguf.export import plan_export


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    source = open_checkpoint(write_small(folder / "ckpt", group_size=256))
    plan_export(source, "tq2_0", "q8_0").write(folder / "small.gguf", lambda t: None)
    return folder / "small.gguf"


@pytest.fixture(scope="module")
def ran(gguf):
    """The command in a process of its own: its JSON, and its log's lines that are measurements."""
    log = gguf.parent / "raw.log"
    command = [sys.executable, "-m", "runtime_ref.bench", str(gguf), "--peers", "-p", "8", "-n", "4", "-t", "1", "-r", "2",
               "--log", str(log), "--llama-bench", sys.executable, "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    measured = [json.loads(line) for line in log.read_text(errors="replace").splitlines() if line.startswith('{"test"')]
    return json.loads(done.stdout), measured


def test_who_takes_part(ran):
    result, _ = ran
    versions = {p["name"]: p["version"] for p in result["participants"]}
    assert versions["xllamacpp"] == version("xllamacpp")
    assert versions["onnxruntime"] == version("onnxruntime")
    assert {"tmexport exact", "tmexport fast"} <= set(versions)
    missing = {m["name"]: m["reason"] for m in result["missing"]}
    assert "does not work as llama-bench" in missing["llama-bench"]  # this Python is none
    assert set(missing) <= {"llama-bench", "llama-cpp-python", "pytritium"}


def test_rows_follow_from_the_log(ran):
    result, measured = ran
    c = SMALL
    inner = mixer(c)
    macs = c.n_layer * (inner.d_in_proj * c.d_model + c.d_model * inner.d_inner) + c.vocab_size * c.d_model
    assert result["multiply_adds_per_token"] == macs
    rows = {(row["test"], row["who"]): row for row in result["rows"]}
    for (test, who), row in rows.items():
        own = [m for m in measured if f"{m['test']}{m['count']}" == test and m["who"] == who]
        rates = [m["count"] / m["seconds"] for m in own]
        assert [m["round"] for m in own] == [0, 1]
        assert row["median"] == pytest.approx(np.median(rates))
        assert (row["lowest"], row["highest"]) == pytest.approx((min(rates), max(rates)))
        work = inner.d_in_proj * c.d_model if test.startswith("product") else macs
        assert row["gmacs_per_thread"] == pytest.approx(work * row["median"] / 1e9)
        for ours, ratio in (row["ratio"] or {}).items():
            assert ratio == pytest.approx(rows[test, ours]["median"] / row["median"])
    assert {test for test, who in rows if who == "xllamacpp"} == {"product1", "product64", "pp8", "tg4"}
    assert {test for test, who in rows if who == "onnxruntime"} == {"product1", "product64"}


def test_rounds_alternate(ran):
    _, measured = ran
    texts = [m["who"] for m in measured if m["test"] == "tg"]
    ours = [f"tmexport {profile}" for profile in PRESETS]
    assert texts == [*ours, "xllamacpp"] * 2 or "llama-cpp-python" in texts


def test_products_are_products(gguf):
    """ggml rounds activations as profile fast does, so the two agree far closer than either does with fp64."""
    problem = problem_of(gguf)
    x = problem.inputs(3)
    want = x.astype(np.float64) @ problem.dense().T
    library = library_of("xllamacpp")
    assert library is not None
    ggml, fast = by_ggml(problem, library[0], x), by_kernels(problem, "fast", x)
    exact, onnx = by_kernels(problem, "exact", x), by_onnxruntime(problem, x)
    size = np.sqrt(np.mean(want**2))
    assert np.abs(ggml.run() - fast.run()).max() < 1e-5 * size
    assert exact.error(x) < 1e-4 < fast.error(x) < 0.03
    assert 1e-4 < onnx.error(x) < 0.03
    np.testing.assert_array_equal(problem.dense(), onnx.weights)
    assert exact.error(x) == pytest.approx(np.sqrt(np.mean((exact.run() - want) ** 2)) / size)


def test_table(ran):
    from runtime_ref.bench.peers.show import table

    result, _ = ran
    text = table(result)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + len(result["rows"])
    assert "Without llama-bench: " in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--log", "x.log"], "belong to --peers"),
        (["-d", "16"], "belong to --peers"),
        (["--peers", "--log", "no/such/folder/x.log"], "cannot be written"),
        (["--peers", "--llama-bench", "no-such-program"], "does not exist"),
    ],
)
def test_refusals(gguf, arguments, says):
    result = CliRunner().invoke(bench, [str(gguf), *arguments])
    assert says in f"{result.output} {result.exception}"
    assert result.exit_code


def test_a_python_that_is_none_is_named(gguf):
    settings = PeerSettings(8, 2, (1,), 1, ("fast",), llama_python=str(Path(__file__)))
    with open("/dev/null", "w") as log:
        result = compare_peers(gguf, settings, log, lambda what, done: None)
    missing = {m["name"]: m["reason"] for m in result["missing"]}
    assert "does not run as a Python" in missing["llama-cpp-python"]


def test_generation_after_a_context(gguf, tmp_path):
    with open(tmp_path / "log", "w") as log:
        result = compare_peers(gguf, PeerSettings(8, 2, (1,), 1, ("fast",), depth=24), log, lambda what, done: None)
    assert {"tmexport fast", "xllamacpp"} <= {row["who"] for row in result["rows"] if row["test"] == "tg2 @ d24"}
    lines = (tmp_path / "log").read_text(errors="replace").splitlines()  # what the others print is there too
    depths = {line["test"]: line["depth"] for line in map(json.loads, filter(lambda line: line[:1] == "{", lines))}
    assert depths == {"product": 0, "pp": 0, "tg": 24}


@pytest.mark.slow
def test_texts_longer_than_a_batch_of_llama_cpp(gguf, tmp_path):
    """Its llama_decode ends the process when it gets more than n_batch tokens (2,048), and fails where the context is full."""
    settings = PeerSettings(3000, 2, (1,), 1, ("fast",), depth=4200)
    with open(tmp_path / "log", "w") as log:
        result = compare_peers(gguf, settings, log, lambda what, done: None)
    assert {"pp3000", "tg2 @ d4200"} <= {row["test"] for row in result["rows"] if row["who"] == "xllamacpp"}


def test_a_model_of_int4_blocks(tmp_path):
    """No codes: the libraries that multiply nothing else say so, the others are measured."""
    write_checkpoint(
        tmp_path / "ckpt", SMALL, coded_tensors(SMALL, "int4"), train_tokenizer(tmp_path / "tokenizer.json")
    )
    plan_export(open_checkpoint(tmp_path / "ckpt"), "auto", "q8_0").write(tmp_path / "small.gguf", lambda t: None)
    problem = problem_of(tmp_path / "small.gguf")
    with open(tmp_path / "log", "w") as log:
        result = compare_peers(problem.gguf.path, PeerSettings(8, 2, (1,), 1, ("fast",)), log, lambda what, done: None)
    assert result["type"] == "Q4_0"
    missing = {m["name"]: m["reason"] for m in result["missing"]}
    assert missing["onnxruntime"] == f"{problem.name} is Q4_0; expected codes -1, 0, 1"
    assert {row["test"] for row in result["rows"] if row["who"] == "xllamacpp"} == {
        "product1",
        "product64",
        "pp8",
        "tg2",
    }
    x = problem.inputs(3)
    library = library_of("xllamacpp")
    assert library is not None
    ggml, fast = by_ggml(problem, library[0], x), by_kernels(problem, "fast", x)
    assert np.abs(ggml.run() - fast.run()).max() < 5e-4 * np.abs(fast.run()).max()  # ggml rounds scales to fp16
