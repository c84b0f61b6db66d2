"""What people do on a board, beside reading a prompt and generating: a turn of a chat, a long document, a live stream.

Token ids are arbitrary, as in `measure`. Each workload returns what a user would wait for, in seconds or tokens a second.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime_ref.bench.measure import some_tokens
from runtime_ref.model import Model
from runtime_ref.state import State

HISTORY, TURN, ANSWER, DOCUMENT, STREAM = 256, 32, 64, 8192, 256
DEADLINES_MS = (50, 100)

Progress = Callable[[int], None]
Result = dict[str, float]


def scaled(size: int, scale: float) -> int:
    return max(2, round(size * scale))


def chat(model: Model, scale: float = 1.0, on_progress: Progress = lambda n: None) -> Result:
    """A turn whose past is a saved state: load it, read 32 new tokens, answer 64, save it for the next turn."""
    new, answer = scaled(TURN, scale), scaled(ANSWER, scale)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        state = model.new_state()
        model.prefill(state, some_tokens(model, scaled(HISTORY, scale)), on_progress)
        state.save(path)
        size = path.stat().st_size
        start = time.perf_counter()
        state = model.load_state(path)
        loaded = time.perf_counter()
        logits = model.prefill(state, some_tokens(model, new), on_progress)
        first = time.perf_counter()
        times = _answer(model, state, logits, answer - 1, on_progress)
        before = time.perf_counter()
        state.save(path)
        saved = time.perf_counter() - before
    return {
        "new_tokens": new, "answer_tokens": answer, "state_bytes": size, "load_s": loaded - start, "save_s": saved,
        "time_to_first_token_s": first - start, "tokens_per_second": len(times) / sum(times),
    }  # fmt: skip


def document(model: Model, scale: float = 1.0, on_progress: Progress = lambda n: None) -> Result:
    """Read 8192 tokens, then answer 64."""
    size, answer = scaled(DOCUMENT, scale), scaled(ANSWER, scale)
    state = model.new_state()
    start = time.perf_counter()
    logits = model.prefill(state, some_tokens(model, size), on_progress)
    first = time.perf_counter() - start
    times = _answer(model, state, logits, answer - 1, on_progress)
    return {
        "document_tokens": size, "answer_tokens": answer, "time_to_first_token_s": first,
        "prompt_tokens_per_second": size / first, "tokens_per_second": len(times) / sum(times),
    }  # fmt: skip


def stream(model: Model, scale: float = 1.0, on_progress: Progress = lambda n: None) -> Result:
    """256 tokens, each wanted before a deadline: the share that made it."""
    state = model.new_state()
    times = _answer(model, state, model.prefill(state, some_tokens(model, 1)), scaled(STREAM, scale), on_progress)
    return {"tokens": len(times), "tokens_per_second": len(times) / sum(times)} | deadlines(times)


def deadlines(seconds: Sequence[float]) -> Result:
    """The share of tokens within each deadline, and the slowest."""
    ms = np.asarray(seconds) * 1e3
    return {f"share_under_{limit}_ms": float((ms <= limit).mean()) for limit in DEADLINES_MS} | {
        "slowest_ms": float(ms.max())
    }


def _answer(model: Model, state: State, logits: np.ndarray, count: int, on_progress: Progress) -> list[float]:
    """Seconds of each of `count` tokens, greedy, the choice included."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        logits = model.decode(state, int(np.argmax(logits)))
        times.append(time.perf_counter() - start)
        on_progress(1)
    return times


WORKLOADS: dict[str, Callable[[Model, float, Progress], Result]] = {
    "chat": chat,
    "document": document,
    "stream": stream,
}


def tokens_of(name: str, scale: float) -> int:
    """About how many tokens a workload takes, for a progress bar."""
    sizes = {"chat": (HISTORY, TURN, ANSWER), "document": (DOCUMENT, ANSWER), "stream": (STREAM,)}[name]
    return sum(scaled(size, scale) for size in sizes)
