"""Two results of the bench side by side: ratios, row by row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmexport.errors import UsageError

_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Ratio:
    """One measured value in both results, in the same unit; ratio is b / a."""

    what: str
    unit: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        return self.b / self.a if self.a else None


def compare(path_a: Path, path_b: Path) -> list[Ratio]:
    """Every value that both results have, in A's order.

    Raises:
        UsageError: a file is not a result of the bench, or the two share no speed test.
    """
    result_a, result_b = read_result(path_a), read_result(path_b)
    tests_a, tests_b = _tests(result_a), _tests(result_b)
    if not set(tests_a) & set(tests_b):
        raise UsageError(
            f"{path_a} and {path_b} have no test in common ({'; '.join(tests_a)[:200]} / {'; '.join(tests_b)[:200]}); "
            "run both with the same -p, -n, -t and --profile"
        )
    a, b = _values(result_a), _values(result_b)
    return [Ratio(what, unit, value, b[what, unit]) for (what, unit), value in a.items() if (what, unit) in b]


def _tests(result: dict[str, Any]) -> list[str]:
    return [_name(row) for row in result["rows"]]


def _name(row: dict[str, Any]) -> str:
    return f"{row['test']}, {row['profile']}, {row['threads']} thr."


def read_result(path: Path) -> dict[str, Any]:
    """The JSON object that `bench --json` printed.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path}: has {path.stat().st_size} bytes; expected a result of the bench (bench --json)")
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: is not JSON; expected what `bench --json` prints") from None
    try:
        _values(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(
            f"{path}: is not a result of the bench ({type(error).__name__}: {error}); expected what `bench --json` prints"
        ) from None
    return result


def _values(result: dict[str, Any]) -> dict[tuple[str, str], float]:
    """Every number worth comparing, by what it is and its unit."""
    found: dict[tuple[str, str], float] = {}

    def put(what: str, unit: str, value: Any) -> None:
        found[what, unit] = _finite(value)

    for row in result["rows"]:
        name = _name(row)
        put(name, "tokens/s", row["tokens_per_second"])
        for quantile, ms in (row.get("latency_ms") or {}).items():
            put(f"{name}: {quantile}", "ms", ms)
        for source, joules in (row.get("joules_per_token") or {}).items():
            put(f"{name}: {source}", "J/token", joules)
    for profile, times in result["load"].items():
        put(f"load, {profile}", "s", times["load_s"])
        put(f"first token, {profile}", "s", times["first_token_s"])
    for profile, depths in result["depth_ms"].items():
        for depth, ms in depths.items():
            put(f"token at depth {depth}, {profile}", "ms", ms)
    for profile, chunks in result.get("chunk_tokens_per_second", {}).items():
        for chunk, rate in chunks.items():
            put(f"prompt in pieces of {chunk}, {profile}", "tokens/s", rate)
    for profile, loads in result.get("workloads", {}).items():
        for work, values in loads.items():
            for key, value in values.items():
                put(f"{work}, {profile}: {key}", "", value)
    for profile, memory in result.get("memory", {}).items():
        put(f"peak memory, {profile}", "MB", memory["peak_rss_bytes"] / 1e6)
    put("peak memory", "MB", result["peak_rss_bytes"] / 1e6)
    put("file", "MB", result["file_bytes"] / 1e6)
    return found


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)
