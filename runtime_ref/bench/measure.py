"""The tests themselves: seconds on the clock around calls of the model.

Tokens are arbitrary ids: speed does not depend on them. Decoding is limited by memory, so it is compared with the read
bandwidth measured in the same run.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from runtime_ref.bench.energy import EnergyRun, Meter
from runtime_ref.model import Model
from runtime_ref.state import State


@dataclass(frozen=True)
class Row:
    """One test: tokens a second, mean and standard deviation over the repeats.

    For tg: latencies of a token in milliseconds (quantiles, and every one), the share of the read bandwidth
    (bytes_per_token * tokens a second), and joules a token by source where the machine measures them.
    """

    test: str
    threads: int
    profile: str
    tokens_per_second: float
    spread: float
    best: float
    latency_ms: dict[str, float] | None = None
    bytes_per_token: int | None = None
    bandwidth_share: float | None = None
    latencies_ms: list[float] | None = None
    joules_per_token: dict[str, float] | None = None


Progress = Callable[[int], None]


def _summary(rates: list[float]) -> tuple[float, float, float]:
    return mean(rates), stdev(rates) if len(rates) > 1 else 0.0, max(rates)


def some_tokens(model: Model, count: int) -> list[int]:
    """`count` token ids that are not all the same."""
    return [(17 * i) % model.config.vocab_size for i in range(count)]


def time_prefill(model: Model, count: int, repeats: int, on_progress: Progress = lambda n: None) -> Row:
    """Tokens a second for a prompt of `count` tokens."""
    tokens = some_tokens(model, count)
    rates = []
    for _ in range(repeats):
        state = model.new_state()
        start = time.perf_counter()
        model.prefill(state, tokens, on_progress)
        rates.append(count / (time.perf_counter() - start))
    return Row(f"pp{count}", model.threads, model.profile, *_summary(rates))


def time_decode(
    model: Model,
    count: int,
    repeats: int,
    bandwidth: float,
    meters: Sequence[Meter] = (),
    on_progress: Progress = lambda n: None,
) -> Row:
    """Tokens a second for `count` tokens one by one, after a first one; bandwidth in bytes a second."""
    rates: list[float] = []
    latencies: list[float] = []
    with EnergyRun(meters) as energy:
        for _ in range(repeats):
            state = model.new_state()
            model.decode(state, 0)
            times = decode_times(model, state, count)
            rates.append(count / sum(times))
            latencies += times
            on_progress(count + 1)
    joules = {name: joules / (repeats * (count + 1)) for name, joules in energy.joules().items()}
    per_token = bytes_per_token(model)
    ms = [1e3 * seconds for seconds in latencies]
    quantiles = {f"p{q}": float(np.percentile(ms, q)) for q in (50, 90, 99)}
    share = per_token * max(rates) / bandwidth
    return Row(
        f"tg{count}", model.threads, model.profile, *_summary(rates), quantiles, per_token, share,
        [round(value, 4) for value in ms], joules or None,
    )  # fmt: skip


def decode_times(model: Model, state: State, count: int) -> list[float]:
    """Seconds of each of `count` decoded tokens."""
    times = []
    for i in range(count):
        start = time.perf_counter()
        model.decode(state, (31 * i) % model.config.vocab_size)
        times.append(time.perf_counter() - start)
    return times


def bytes_per_token(model: Model) -> int:
    """Bytes that decoding a token must move: weights and head read once, the state read and written."""
    return model.weight_bytes + 2 * model.new_state().nbytes


def time_depths(
    model: Model, depths: Sequence[int], count: int, on_progress: Progress = lambda n: None
) -> dict[str, float]:
    """Median milliseconds of a token after `depth` tokens of context, by depth."""
    state, result = model.new_state(), {}
    for depth in sorted(depths):
        missing = depth - state.tokens
        if missing > 0:
            model.prefill(state, some_tokens(model, missing), on_progress)
        result[str(depth)] = float(np.median(decode_times(model, state.copy(), count))) * 1e3
        on_progress(count)
    return result


def chunk_tokens(chunk: int) -> int:
    """How many tokens the test of a chunk length reads: enough to time."""
    return max(128 // chunk, 1) * chunk


def time_chunks(model: Model, chunks: Sequence[int], on_progress: Progress = lambda n: None) -> dict[str, float]:
    """Tokens a second when a prompt is handed over in pieces of so many tokens; the better of two runs."""
    result = {}
    for chunk in chunks:
        total, tokens, best = chunk_tokens(chunk), some_tokens(model, chunk), 0.0
        for _ in range(2):
            state = model.new_state()
            start = time.perf_counter()
            for _ in range(total // chunk):
                model.prefill(state, tokens, on_progress)
            best = max(best, total / (time.perf_counter() - start))
        result[str(chunk)] = best
    return result


def peak_rss() -> int:
    """The most memory this process has had, in bytes; on Linux since the last `reset_peak`; 0 on Windows, which was not tried."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Count the peak memory from now on, where the system can (Linux, proc(5): clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
