"""One participant of the comparison in a process of its own, which stays alive and times what it is told to.

    python -m runtime_ref.bench.peers.worker MODEL.gguf {"kind": "tmexport", "profile": "fast"}

Reads a JSON object a line, {"test": "pp" | "tg" | "product", "count": n, "threads": t, "depth": tokens before}; answers {"seconds", "cpu_seconds"}, for a
product also {"error", "nbytes"}. Its first line is {"tests": [...]}, or {"refused": why}. A library's own output goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from runtime_ref.bench.peers.products import (
    Problem,
    Product,
    by_ggml,
    by_kernels,
    by_onnxruntime,
    by_pytritium,
    problem_of,
)
from tmexport.errors import TmexportError
from tmexport.gguf.names import config_from_metadata

SHORTEST = 0.1  # seconds of a measurement of products
Answer = dict[str, Any]
Timed = Callable[[str, int, int, int], Answer]  # test, count, threads, depth


def _texts(
    start: Callable[[int], None], read: Callable[[list[int]], None], step: Callable[[int], None], vocabulary: int
) -> Timed:
    """pp and tg of a runtime: start(threads) forgets everything and reads a token; read a prompt; step by one token."""
    different = min(vocabulary, 1000)

    def time_text(test: str, count: int, threads: int, depth: int) -> Answer:
        start(threads)
        if depth:
            read([(17 * i) % different for i in range(depth)])
        clock, cpu = time.perf_counter(), time.process_time()
        if test == "pp":
            read([(17 * i) % different for i in range(count)])
        else:
            for i in range(count):
                step((31 * i) % different)
        return {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}

    return time_text


def _products(problem: Problem, make: Callable[[Any], Product]) -> Timed:
    """Seconds of one product of `count` tokens, from as many as fill SHORTEST."""
    made: dict[int, tuple[Product, float, int]] = {}

    def time_product(test: str, count: int, threads: int, depth: int) -> Answer:
        if count not in made:
            x = problem.inputs(count)
            product = make(x)
            error = product.error(x)
            start = time.perf_counter()
            product.run()
            once = max(time.perf_counter() - start, 1e-6)
            made[count] = product, error, max(1, round(SHORTEST / once))
        product, error, times = made[count]
        clock, cpu = time.perf_counter(), time.process_time()
        for _ in range(times):
            product.run()
        share = times * product.repeated
        return {"seconds": (time.perf_counter() - clock) / share, "cpu_seconds": (time.process_time() - cpu) / share,
                "error": error, "nbytes": product.nbytes}  # fmt: skip

    return time_product


def _ours(path: Path, profile: str) -> Timed:
    from runtime_ref.model import Model

    model = Model.load(path, profile, 1)
    model.compile()
    states = [model.new_state()]

    def start(threads: int) -> None:
        if model.threads != threads:
            model.threads = threads
        states[0] = model.new_state()
        model.decode(states[0], 0)

    return _texts(
        start,
        lambda tokens: _drop(model.prefill(states[0], tokens)),
        lambda token: _drop(model.decode(states[0], token)),
        model.config.vocab_size,
    )


def _llama(path: Path, library: Path, context: int, vocabulary: int) -> Timed:
    from runtime_ref.bench.peers.llama import Llama, open_library

    llama = Llama(open_library(library), path, context)
    return _texts(llama.start, llama.read, lambda token: llama.read([token]), vocabulary)


def _drop(_: object) -> None:
    """What a measurement does with a result."""


def tests_of(path: Path, about: dict[str, Any]) -> dict[str, Timed]:
    """The tests that a participant takes, by name.

    Raises:
        TmexportError: it cannot take part, with the reason.
    """
    kind, problem = about["kind"], problem_of(path)
    if kind == "tmexport":
        text = _ours(path, about["profile"])
        return {
            "pp": text,
            "tg": text,
            "product": _products(problem, lambda x: by_kernels(problem, about["profile"], x)),
        }
    if kind == "llama":
        vocabulary = config_from_metadata(problem.gguf).vocab_size
        text = _llama(path, Path(about["library"]), about["context"], vocabulary)
        return {
            "pp": text,
            "tg": text,
            "product": _products(problem, lambda x: by_ggml(problem, Path(about["library"]), x)),
        }
    problem.codes()  # all that these two multiply
    by = {"onnxruntime": by_onnxruntime, "pytritium": by_pytritium}[kind]
    return {"product": _products(problem, lambda x: by(problem, x))}


def serve(path: Path, about: dict[str, Any], answers: TextIO) -> None:
    """Answer the lines of stdin until it ends."""

    def say(answer: Answer) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        tests = tests_of(path, about)
        say({"tests": list(tests)})
        for line in sys.stdin:
            wanted = json.loads(line)
            say(tests[wanted["test"]](wanted["test"], wanted["count"], wanted["threads"], wanted["depth"]))
    except (TmexportError, ImportError, OSError) as error:
        say({"refused": str(error)})


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Path(sys.argv[1]), json.loads(sys.argv[2]), own)
