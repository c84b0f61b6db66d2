"""A result of the bench as one page: inline style and pictures, no script, nothing fetched, so it opens anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench import svg

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c2430;background:#f4f6f8;margin:0;padding:16px}
main{max-width:1180px;margin:auto}
h1{font-size:22px;margin:4px 0}h2{font-size:16px;margin:0 0 8px}
p{margin:4px 0 12px;color:#445}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:14px}
section{background:#fff;border:1px solid #dfe3e8;border-radius:8px;padding:14px;overflow-x:auto;min-width:0}
section.wide{grid-column:1/-1}.note code{white-space:nowrap}
svg{width:100%;height:auto;max-width:600px;display:block;margin:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:4px 8px;text-align:right;border-bottom:1px solid #eceff2;white-space:nowrap}
th{color:#556;font-weight:600}
th:first-child,td:first-child{text-align:left}
table.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}table.facts td:first-child{color:#556;width:34%}
.note{font-size:13px;color:#667;margin:8px 0 0}
"""


def page(result: dict[str, Any]) -> str:
    """The whole page, as text."""
    model = Path(result["model"]).name
    machine = result["machine"]
    who = machine.get("board") or machine["cpu"]
    parts = [
        _section("Speed", _speeds(result), wide=True),
        *(_latency(row) for row in result["rows"] if row["latencies_ms"]),
        _section("Decoding, by what was read before", svg.lines(
            {name: _points(times) for name, times in result["depth_ms"].items()}, "tokens of context", "ms a token")),
        _section("Reading a prompt, by the pieces it is handed over in", svg.lines(
            {name: _points(rates) for name, rates in result["chunk_tokens_per_second"].items()},
            "tokens a piece", "tokens/s", log_x=True)),
        _section("Memory", svg.bars(_memory(result), "MB", "memory")
                 + '<p class="note">Needed: what <code>--max-memory</code> counts, before loading: weights, states, '
                 "Python, and compiling in the first run.</p>"),
        _section("File size in every type", svg.bars(*_sizes(result))
                 + '<p class="note">Bold: this file. Type of the projections + type of the embedding.</p>'),
        *([_section("Workloads", _workloads(result), wide=True)] if any(result["workloads"].values()) else []),
        _section("Machine", _facts(_machine(machine))),
        _section("Run", _facts(_run(result))),
    ]  # fmt: skip
    title = escape(f"{model} on {who}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{title}</title><style>{_STYLE}</style></head>\n<body><main><h1>{title}</h1>\n'
        f"<p>{escape(_headline(result))}</p>\n"
        f'<div class="grid">\n{chr(10).join(parts)}\n</div></main></body></html>\n'
    )


def _headline(result: dict[str, Any]) -> str:
    best = max((row for row in result["rows"] if row["latency_ms"]), key=lambda row: row["tokens_per_second"])
    return (
        f"{result['type']} with a {result['embedding_type']} embedding, {_mb(result['file_bytes'])} MB. Decoding: up to "
        f"{svg.number(best['tokens_per_second'])} tokens/s (profile {best['profile']}, {_threads(best['threads'])}). "
        f"Peak memory: {_mb(result['peak_rss_bytes'])} MB. Measured {result['measured_at']}."
    )


def _speeds(result: dict[str, Any]) -> str:
    energy = sorted({source for row in result["rows"] for source in row["joules_per_token"] or {}})
    head = ["test", "profile", "threads", "tokens/s", "±", "best", "p50 ms", "p90 ms", "p99 ms", "of read bandwidth"]
    rows = []
    for row in result["rows"]:
        latency, joules = row["latency_ms"] or {}, row["joules_per_token"] or {}
        cells = [row["test"], row["profile"], str(row["threads"])]
        cells += [svg.number(row[key]) for key in ("tokens_per_second", "spread", "best")]
        cells += [svg.number(latency[q]) if latency else "" for q in ("p50", "p90", "p99")]
        cells.append(f"{row['bandwidth_share']:.0%}" if row["bandwidth_share"] else "")
        rows.append(cells + [svg.number(joules[s]) if s in joules else "" for s in energy])
    note = "pp: reading a prompt of so many tokens; tg: generating so many, one by one."
    note += "" if energy else " This machine does not tell how much energy it uses."
    return _table(head + [f"J/token, {source}" for source in energy], rows) + f'<p class="note">{note}</p>'


def _latency(row: dict[str, Any]) -> str:
    picture = svg.histogram(
        row["latencies_ms"],
        row["latency_ms"],
        "ms a token",
        "tokens",
        svg.COLORS[list(PRESETS).index(row["profile"]) % len(svg.COLORS)],
    )
    return _section(f"Latency of a token, {row['profile']}, {_threads(row['threads'])}", picture)


def _memory(result: dict[str, Any]) -> list[tuple[str, float]]:
    items = [("file", result["file_bytes"] / 1e6)]
    for name, memory in result["memory"].items():
        items += [(f"{name}: weights", memory["weight_bytes"] / 1e6), (f"{name}: state", memory["state_bytes"] / 1e6),
                  (f"{name}: peak (RSS)", memory["peak_rss_bytes"] / 1e6),
                  (f"{name}: needed", memory["expected_bytes"] / 1e6)]  # fmt: skip
    return items


def _sizes(result: dict[str, Any]) -> tuple[list[tuple[str, float]], str, str, list[str]]:
    items = [(f"{s['type']} + {s['embedding']}", s["bytes"] / 1e6) for s in result["file_sizes"] if s["bytes"]]
    return items, "MB", "file sizes", [f"{result['type']} + {result['embedding_type']}"]


def _workloads(result: dict[str, Any]) -> str:
    """A row for each number, a column for each profile."""
    profiles = list(result["workloads"])
    first = result["workloads"][profiles[0]]
    rows = [
        [f"{work}: {_words(key)}", *(_amount(key, result["workloads"][name][work][key]) for name in profiles)]
        for work, values in first.items()
        for key in values
    ]
    threads = _threads(max(result["settings"]["threads"]))
    note = (
        f"With {threads}. chat: a turn that begins with loading the state saved after the last one and ends with saving it; "
        "document: a long text, then an answer; stream: tokens that have a deadline."
    )
    return _table(["workload", *profiles], rows) + f'<p class="note">{note}</p>'


def _words(key: str) -> str:
    for unit in ("_s", "_ms", "_bytes"):
        key = key.removesuffix(unit) if not key.startswith("share") else key
    return key.replace("_", " ").replace("tokens per second", "tokens/s")


def _amount(key: str, value: float) -> str:
    if key.startswith("share"):
        return f"{value:.1%}"
    if key.endswith("_bytes"):
        return f"{_mb(value)} MB"
    unit = "ms" if key.endswith("_ms") else "s" if key.endswith("_s") else ""
    return f"{value:,}" if isinstance(value, int) else f"{svg.number(value)} {unit}".strip()


def _machine(machine: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "board", machine["board"] or ""
    yield "processor", machine["cpu"]
    yield "cores", str(machine["cores"] or "")
    yield "instruction set", machine["isa"]
    yield "caches", ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    yield "memory", f"{machine['memory_bytes'] / 1e9:.1f} GB" if machine["memory_bytes"] else ""
    for threads, rate in machine["read_bytes_per_second"].items():
        yield f"reads, {_threads(int(threads))}", f"{rate / 1e9:.1f} GB/s"
    yield "governor", machine["governor"] or ""
    yield "highest clock", f"{machine['max_mhz']:,.0f} MHz" if machine["max_mhz"] else ""
    for when in ("before", "after"):
        state = machine[when]
        yield f"clock {when}", f"{state['mhz']:,.0f} MHz" if state["mhz"] else ""
        yield f"temperature {when}", ", ".join(f"{zone} {t:.1f} °C" for zone, t in state["temperature_c"].items())
        if state["throttled"] is not None:
            yield f"throttling {when}", ", ".join(state["throttled"]) or "none"
        if state["throttle_count"] is not None:
            yield f"throttle count {when}", str(state["throttle_count"])
    yield "energy", ", ".join(machine["energy_sources"])
    yield "system", machine["system"]
    for name in ("python", "tmexport", "numpy", "numba", "llvmlite"):
        yield name, machine[name] or ""


def _run(result: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "model", result["model"]
    for name, load in result["load"].items():
        yield f"load, {name}", f"{load['load_s']:.2f} s; kernels {load['compile_s']:.2f} s"
        yield f"first token, {name}", f"{load['first_token_s']:.2f} s after the start of loading"
    for name, value in result["settings"].items():
        yield name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _section(title: str, body: str, wide: bool = False) -> str:
    return f"<section{' class=' + chr(34) + 'wide' + chr(34) if wide else ''}><h2>{escape(title)}</h2>{body}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A table of what is known; what is not is left out."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in pairs if text)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _points(values: dict[str, float]) -> list[tuple[float, float]]:
    return [(float(x), y) for x, y in values.items()]


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _mb(size: float) -> str:
    return svg.number(size / 1e6)
