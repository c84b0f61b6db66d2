"""The bench as a command, run once on a small model: its JSON, its page, its comparison, its refusals."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench import svg
from runtime_ref.bench.cli import bench
from runtime_ref.bench.report import page
from runtime_ref.bench.workloads import deadlines
from runtime_ref.model import Model
from tests.models import SMALL, mixer, write_small
from tests.runtime_ref.boards import raspberry_pi_5
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TmexportError, UsageError
from tmexport.gguf.export import plan_export

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    source = open_checkpoint(write_small(folder / "ckpt", group_size=256))
    plan_export(source, "tq2_0", "q8_0").write(folder / "small.gguf", lambda t: None)
    return folder / "small.gguf"


@pytest.fixture(scope="module")
def ran(gguf):
    """The command in a process of its own: its JSON and its page."""
    report = gguf.parent / "out.html"
    command = [sys.executable, "-m", "runtime_ref.bench", str(gguf), "-p", "8", "-n", "5", "-t", "1,2", "-r", "3", "--depth", "0,16",
               "--chunks", "1,8", "--workloads", "chat,document,stream", "--workload-scale", "0.02", "--report", str(report),
               "--max-memory", "2G", "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), report.read_text(encoding="utf-8")


def test_rows_agree_with_the_latencies_they_come_from(ran):
    result, _ = ran
    rows = {(row["test"], row["profile"], row["threads"]): row for row in result["rows"]}
    assert set(rows) == {(t, p, n) for t in ("pp8", "tg5") for p in PRESETS for n in (1, 2)}
    for (test, _, _), row in rows.items():
        if test == "pp8":
            assert row["latencies_ms"] is None
            continue
        ms = np.array(row["latencies_ms"]).reshape(3, 5)
        for quantile, value in row["latency_ms"].items():
            assert value == pytest.approx(np.percentile(ms, float(quantile[1:])), rel=1e-3, abs=2e-4)
        rates = 5e3 / ms.sum(axis=1)
        assert row["tokens_per_second"] == pytest.approx(rates.mean(), rel=1e-2)
        assert row["spread"] == pytest.approx(rates.std(ddof=1), rel=5e-2, abs=1.0)
        bandwidth = result["machine"]["read_bytes_per_second"][str(row["threads"])]
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_token"] * row["best"] / bandwidth)


def test_bytes_per_token_by_hand(ran):
    result, _ = ran
    c, m = SMALL, mixer(SMALL)
    projections = c.n_layer * (-(-m.d_in_proj // 16) * 16 * c.d_model + c.d_model * m.d_inner) * (1 / 4 + 2 / 256)
    head = c.vocab_size * c.d_model * 34 / 32
    small = 4 * (c.n_layer * (c.d_model + 5 * m.conv_dim + 3 * m.n_heads + m.d_inner) + c.d_model)
    for row in result["rows"]:
        if row["test"] == "tg5":
            width = {"exact": 4, "fast": 2, "compact": 1 + 4 / m.d_state}[row["profile"]]
            state = c.n_layer * (3 * m.conv_dim * 4 + m.d_inner * m.d_state * width)
            assert row["bytes_per_token"] == projections + head + small + 2 * state


def test_everything_asked_for_is_there(ran, gguf):
    result, _ = ran
    assert result["file_bytes"] == gguf.stat().st_size
    assert (result["type"], result["embedding_type"]) == ("TQ2_0", "Q8_0")
    assert {s["bytes"] for s in result["file_sizes"]} >= {result["file_bytes"]}
    for profile in PRESETS:
        assert set(result["load"][profile]) == {"load_s", "compile_s", "first_token_s"}
        assert list(result["depth_ms"][profile]) == ["0", "16"]
        assert list(result["chunk_tokens_per_second"][profile]) == ["1", "8"]
        assert set(result["workloads"][profile]) == {"chat", "document", "stream"}
        memory = result["memory"][profile]
        assert memory["peak_rss_bytes"] <= memory["expected_bytes"] <= 2.5 * memory["peak_rss_bytes"]
        chat = result["workloads"][profile]["chat"]
        assert chat["state_bytes"] >= memory["state_bytes"]
        assert chat["time_to_first_token_s"] > chat["load_s"] > 0
        assert result["workloads"][profile]["document"]["document_tokens"] == round(8192 * 0.02)
    assert result["peak_rss_bytes"] == max(m["peak_rss_bytes"] for m in result["memory"].values())
    assert {"cpu", "isa", "numba", "numpy", "python"} <= set(result["machine"])


def test_deadlines_by_hand():
    told = deadlines([0.04, 0.05, 0.06, 0.2])
    assert told == {"share_under_50_ms": 0.5, "share_under_100_ms": 0.75, "slowest_ms": pytest.approx(200)}


class _Page(HTMLParser):
    """Elements that are opened and closed in order, their attributes, and the text."""

    VOID = ("meta", "br", "hr", "link", "img")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def parsed(text):
    found = _Page()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


def test_the_page_stands_alone(ran):
    result, text = ran
    found = parsed(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert {name for name, _ in found.attributes} & {"src", "href", "srcset", "onload"} == set()
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg")  # the namespace's name
    assert "small.gguf" in found.text
    assert result["machine"]["cpu"] in found.text
    for words in ("p50", "p90", "p99", "of read bandwidth", "File size in every type", "chat: time to first token",
                  "TQ1_0 + F16", "exact: peak (RSS)", "governor" if result["machine"]["governor"] else "processor"):  # fmt: skip
        assert words in found.text, words


def test_the_pictures_are_svg_that_fits(ran):
    _, text = ran
    pictures = [ElementTree.fromstring(part) for part in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(pictures) == 2 * len(PRESETS) + 4  # a histogram for each tg row; depth, chunks, memory, sizes
    for picture in pictures:
        _, _, width, height = map(float, picture.get("viewBox").split())
        for mark in picture.iter(f"{SVG}text"):
            size, x = 12 * 0.62 * len(mark.text), float(mark.get("x"))
            left = {"start": x, "middle": x - size / 2, "end": x - size}[mark.get("text-anchor")]
            assert left >= -3, mark.text
            assert left + size <= width + 3, mark.text
            assert 0 < float(mark.get("y")) <= height
        for shape in picture.iter(f"{SVG}rect"):
            assert 0 <= float(shape.get("x")) <= float(shape.get("x")) + float(shape.get("width")) <= width + 0.5
            assert float(shape.get("height")) >= 0


def test_a_board_in_the_page(ran, tmp_path):
    """As it would be on a Raspberry Pi that measures its energy; names are not trusted to be harmless."""
    from runtime_ref.bench.machine import conditions, hardware

    result = copy.deepcopy(ran[0])
    root = raspberry_pi_5(tmp_path)
    result["machine"] |= hardware(root) | {"before": conditions(root), "after": conditions(root)}
    result["rows"][1]["joules_per_token"] = {"ina219 <b>": 0.125}
    result["machine"]["energy_sources"] = ["ina219 <b>"]
    found = parsed(page(result))
    for words in ("small.gguf on Raspberry Pi 5 Model B Rev 1.0", "Cortex-A76", "ondemand", "cpu-thermal 61.7 °C", "J/token, ina219 <b>",
                  "under-voltage now, throttled now", "0.125"):  # fmt: skip
        assert words in found.text, words
    assert "b" not in found.tags


def run(*args):
    return CliRunner().invoke(bench, [str(a) for a in args])


def test_compare_prints_ratios(ran, tmp_path):
    result = ran[0]
    faster = copy.deepcopy(result)
    for row in faster["rows"]:
        row["tokens_per_second"] *= 2
    faster["load"]["exact"]["load_s"] /= 4
    faster["memory"]["fast"]["peak_rss_bytes"] *= 3
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "b.json").write_text(json.dumps(faster))
    printed = run("--compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert printed.exit_code == 0, printed.output
    ratios = {(row["what"], row["unit"]): row["ratio"] for row in json.loads(printed.stdout)["rows"]}
    assert ratios["tg5, fast, 2 thr.", "tokens/s"] == pytest.approx(2)
    assert ratios["load, exact", "s"] == pytest.approx(0.25)
    assert ratios["load, fast", "s"] == pytest.approx(1)
    assert ratios["peak memory, fast", "MB"] == pytest.approx(3)
    lines = run("--compare", tmp_path / "a.json", tmp_path / "b.json").stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("tg5, fast, 2 thr.  ")]
    assert line.split()[-2:] == ["2.000", "tokens/s"]
    assert len(lines) == len(ratios) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "b.json: cannot be read: No such file"),
        ("{", "b.json: is not JSON"),
        ("[1]", "b.json: is not a result of the bench"),
        ('{"rows": []}', "b.json: is not a result of the bench (KeyError: 'load')"),
        ("nan", "NaN is not|nan is not a finite number"),
        ("other", "have no test in common"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(ran, tmp_path, content, message):
    result = copy.deepcopy(ran[0])
    (tmp_path / "a.json").write_text(json.dumps(result))
    if content == "nan":
        result["rows"][0]["tokens_per_second"] = float("nan")
        content = json.dumps(result)
    if content == "other":
        result["rows"] = [row | {"test": "pp9"} for row in result["rows"]]
        content = json.dumps(result)
    if content is not None:
        (tmp_path / "b.json").write_text(content)
    refused = run("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert isinstance(refused.exception, UsageError)
    assert any(part in str(refused.exception) for part in message.split("|"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "missing MODEL.gguf"),
        (["m.gguf", "--compare", "a", "b"], "cannot time m.gguf as well"),
        (["m.gguf", "--profile", "quick"], "'quick'; expected exact"),
        (["m.gguf", "--workloads", "chat,tea"], "'chat,tea'; expected chat or document or stream"),
        (["m.gguf", "-t", "0"], "too small"),
        (["m.gguf", "-t", "5000"], "more than 1024 threads"),
        (["m.gguf", "--chunks", "1,x"], "is not a list of whole numbers"),
        (["m.gguf", "--workload-scale", "0"], "0"),
        (["m.gguf", "--max-memory", "much"], "'much' is not an amount of memory"),
        (["m.gguf", "--report", "no/such/folder/out.html"], "no/such/folder/out.html: cannot be written"),
    ],
)
def test_wrong_use_is_one_line_and_code_2(args, message):
    refused = run(*args)
    said = str(refused.exception) if isinstance(refused.exception, TmexportError) else refused.output
    assert message in said
    assert getattr(refused.exception, "exit_code", refused.exit_code) == 2


def test_too_little_memory_and_a_missing_model(gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "load", lambda *args: pytest.fail("was loaded"))
    refused = run(gguf, "--max-memory", "100M", "--report", tmp_path / "out.html").exception
    assert isinstance(refused, TmexportError)
    assert refused.exit_code == 1
    assert re.search(r"needs \d+ MB of memory in profile exact .*more than the 100 MB allowed", str(refused))
    missing = run(tmp_path / "none.gguf", "--report", tmp_path / "out.html")
    assert "none.gguf: cannot be read" in str(missing.exception)
    assert list(tmp_path.iterdir()) == []


def test_a_histogram_counts():
    values = [1.0] * 5 + [2.0] * 10 + [4.0] * 20 + [3.0]
    picture = ElementTree.fromstring(svg.histogram(values, {"p50": 2.0, "p99": 4.0}, "ms", "tokens"))
    heights = sorted(float(r.get("height")) for r in picture.iter(f"{SVG}rect"))
    assert [h / heights[0] for h in heights] == pytest.approx([1, 5, 10, 20], rel=0.02)
    marks = [t.text for t in picture.iter(f"{SVG}text")]
    assert "p50 2.00" in marks
    assert "p99 4.00" in marks


def test_a_long_tail_is_a_note_and_equal_values_a_picture():
    tail = ElementTree.fromstring(svg.histogram([1.0] * 50 + [1.5] * 49 + [90.0], {"p99": 1.5}, "ms", "tokens"))
    assert "1 more beyond, up to 90.0" in [t.text for t in tail.iter(f"{SVG}text")]
    same = ElementTree.fromstring(svg.histogram([3.0], {"p50": 3.0}, "ms", "tokens"))
    assert len(list(same.iter(f"{SVG}rect"))) == 1


@pytest.mark.parametrize(
    ("low", "high", "want"), [(0, 10, [0, 2, 4, 6, 8, 10]), (0.12, 0.31, [0.15, 0.2, 0.25, 0.3]), (5, 5, [5])]
)
def test_ticks_are_round(low, high, want):
    assert svg.ticks(low, high) == pytest.approx(want)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (1e-9, "0.000000")],
)
def test_numbers_have_three_digits(value, text):
    assert svg.number(value) == text
