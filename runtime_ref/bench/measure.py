"""The tests themselves: seconds on the clock around calls of the model.

Tokens are arbitrary ids: speed does not depend on them. Decoding is limited by memory, so it is compared with the read
bandwidth measured in the same run.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

from runtime_ref.model import Model
from runtime_ref.state import State


@dataclass(frozen=True)
class Row:
    """One test: tokens a second, mean and standard deviation over the repeats.

    For tg: latencies of a token in milliseconds, and the share of the read bandwidth (bytes_per_token * tokens a second).
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


def _summary(rates: list[float]) -> tuple[float, float, float]:
    return mean(rates), stdev(rates) if len(rates) > 1 else 0.0, max(rates)


def some_tokens(model: Model, count: int) -> list[int]:
    """`count` token ids that are not all the same."""
    return [(17 * i) % model.config.vocab_size for i in range(count)]


def time_prefill(model: Model, count: int, repeats: int) -> Row:
    """Tokens a second for a prompt of `count` tokens."""
    tokens = some_tokens(model, count)
    rates = []
    for _ in range(repeats):
        state = model.new_state()
        start = time.perf_counter()
        model.prefill(state, tokens)
        rates.append(count / (time.perf_counter() - start))
    return Row(f"pp{count}", model.threads, model.profile, *_summary(rates))


def time_decode(model: Model, count: int, repeats: int, bandwidth: float) -> Row:
    """Tokens a second for `count` tokens one by one, after a first one; bandwidth in bytes a second."""
    rates: list[float] = []
    latencies: list[float] = []
    for _ in range(repeats):
        state = model.new_state()
        model.decode(state, 0)
        times = decode_times(model, state, count)
        rates.append(count / sum(times))
        latencies += times
    per_token = bytes_per_token(model)
    quantiles = {f"p{q}": float(np.percentile(latencies, q)) * 1e3 for q in (50, 90, 99)}
    share = per_token * max(rates) / bandwidth
    return Row(f"tg{count}", model.threads, model.profile, *_summary(rates), quantiles, per_token, share)


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


def time_depths(model: Model, depths: list[int], count: int) -> dict[str, float]:
    """Median milliseconds of a token after `depth` tokens of context, by depth."""
    state, result = model.new_state(), {}
    for depth in sorted(depths):
        missing = depth - state.tokens
        if missing > 0:
            model.prefill(state, some_tokens(model, missing))
        result[str(depth)] = float(np.median(decode_times(model, state.copy(), count))) * 1e3
    return result


def peak_rss() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
