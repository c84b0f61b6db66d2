"""The same model and the same products in every runtime that is there, interleaved: `tmexport bench MODEL.gguf --peers`.

Each participant lives in a process of its own (worker.py); rounds alternate between them, so that a machine that slows down
slows all. Every measurement is one line of the log, as it comes. `compare_peers` returns an object that JSON can hold:

{"model", "type", "machine", "rounds", "multiply_adds_per_token", "product": {"name", "n", "k"}, "participants": [{"name",
"version"}], "missing": [{"name", "reason"}], "rows": [{"test", "threads", "who", "unit", "median", "lowest", "highest", "median_by_cpu_time",
"gmacs_per_thread", "gigabytes_per_thread", "error", "ratio": {ours: ours / it}}]}
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import IO, Any

from runtime_ref.bench.machine import describe
from runtime_ref.bench.peers.llama import library_of
from tmexport.errors import TmexportError
from tmexport.gguf.names import config_from_metadata
from tmexport.gguf.reader import GGUFFile

PRODUCTS = (1, 64)  # tokens of the product alone: decoding, and a chunk of a prompt


@dataclass(frozen=True)
class PeerSettings:
    """What to compare. depth: tokens read before those of the generation test; llama_python: a Python with llama-cpp-python; llama_bench: that program, of llama.cpp or a fork."""

    prompt: int = 128
    count: int = 64
    threads: Sequence[int] = (1, 2)
    repeats: int = 5
    profiles: Sequence[str] = ("exact", "fast")
    llama_python: str | None = None
    llama_bench: Path | None = None
    depth: int = 0


@dataclass
class Sample:
    """One measurement: seconds by the clock and of CPU time (None where another program measured itself)."""

    seconds: float
    cpu_seconds: float | None = None
    error: float | None = None
    nbytes: int | None = None


class Worker:
    """A participant in a process of its own; `tests` are those it takes."""

    def __init__(self, name: str, release: str, model: Path, about: dict[str, Any], log: IO[str] | int) -> None:
        """Raises TmexportError if it cannot take part."""
        self.name, self.version = name, release
        command = [sys.executable, "-m", "runtime_ref.bench.peers.worker", str(model), json.dumps(about)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )  # fmt: skip
        try:
            self.tests: list[str] = self._answer()["tests"]
        except TmexportError:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise TmexportError(f"{self.name}: its process ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "refused" in answer:
            raise TmexportError(f"{self.name}: {answer['refused']}")
        return answer

    def measure(self, test: str, count: int, threads: int, depth: int = 0) -> Sample:
        """Raises TmexportError if the process ends."""
        assert self._process.stdin
        asked = {"test": test, "count": count, "threads": threads, "depth": depth}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Sample(**self._answer())

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class LlamaBench:
    """llama-bench, run once for each measurement; it reads the model again each time, which is not counted."""

    tests = ("pp", "tg")

    def __init__(self, program: Path, model: Path, log: IO[str]) -> None:
        """Raises TmexportError if it cannot be run."""
        self.name, self.version, self._model, self._log = f"llama-bench ({program.parent.name})", "", model, log
        self._program = program.absolute()
        self.measure("tg", 1, 1)

    def measure(self, test: str, count: int, threads: int, depth: int = 0) -> Sample:
        """Raises TmexportError if it fails, or prints something else."""
        sizes = ["-p", str(count), "-n", "0"] if test == "pp" else ["-p", "0", "-n", str(count)]
        deep = ("-d", str(depth)) if depth else ()  # which not every fork has
        command = [
            str(self._program),
            "-m",
            str(self._model),
            *sizes,
            *deep,
            "-t",
            str(threads),
            "-r",
            "1",
            "-o",
            "json",
        ]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
            row = json.loads(done.stdout)[0]
            self.version = str(row["build_commit"])
            return Sample(row["avg_ns"] * 1e-9)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TmexportError(f"{self._program}: does not work as llama-bench -o json: {error}") from None

    def close(self) -> None:
        """Nothing is running."""


Participant = Worker | LlamaBench


def _participants(
    path: Path, settings: PeerSettings, log: IO[str], on_progress: Callable[[str, int], None]
) -> tuple[list[Participant], list[dict[str, str]]]:
    """Who takes part, ours first; and who does not, and why."""
    found: list[Participant] = []
    missing: list[dict[str, str]] = []

    def add(name: str, make: Callable[[], Participant | None]) -> None:
        on_progress(f"starting {name}", 0)
        try:
            made = make()
            if made is None:
                missing.append({"name": name, "reason": "is not installed"})
            else:
                found.append(made)
        except TmexportError as error:
            missing.append({"name": name, "reason": str(error).removeprefix(f"{name}: ")})

    for profile in settings.profiles:
        about = {"kind": "tmexport", "profile": profile}
        found.append(Worker(f"tmexport {profile}", version("tmexport"), path, about, log))
    for package, python in (("xllamacpp", None), ("llama_cpp", settings.llama_python)):
        name = {"llama_cpp": "llama-cpp-python"}.get(package, package)

        def llama(name: str = name, package: str = package, python: str | None = python) -> Participant | None:
            library = library_of(package, python)
            if library is None:
                return None
            longest = 1 + max(settings.prompt, settings.depth + settings.count)  # a token is read to start
            about = {"kind": "llama", "library": str(library[0]), "context": longest}
            return Worker(name, library[1], path, about, log)

        add(name, llama)
    if settings.llama_bench:
        program = settings.llama_bench
        add("llama-bench", lambda: LlamaBench(program, path, log))
    for name, package in (("onnxruntime", "onnxruntime"), ("pytritium", "tritium")):

        def product(name: str = name, package: str = package) -> Participant | None:
            if importlib.util.find_spec(package) is None:
                return None
            return Worker(name, version(name), path, {"kind": name}, log)

        add(name, product)
    return found, missing


def compare_peers(
    path: Path, settings: PeerSettings, log: IO[str], on_progress: Callable[[str, int], None]
) -> dict[str, Any]:
    """Measure the model in `path` with everyone who is there; on_progress(what, measurements done).

    Raises:
        TmexportError: the file is damaged, or the runtime does not compute it.
    """
    from runtime_ref.bench.peers.products import problem_of

    problem = problem_of(path)
    macs, nbytes = multiply_adds(problem.gguf), token_bytes(problem.gguf)
    n, k = problem.shape
    tests = [("product", m, 1, 0) for m in PRODUCTS]
    texts = (("pp", settings.prompt, 0), ("tg", settings.count, settings.depth))
    tests += [(t, c, number, depth) for number in settings.threads for t, c, depth in texts]
    people, missing = _participants(path, settings, log, on_progress)
    rows = []
    try:
        for test, count, threads, depth in tests:
            samples: dict[str, list[Sample]] = {p.name: [] for p in people if test in p.tests}
            for number in range(settings.repeats):
                for person in [p for p in people if p.name in samples]:
                    on_progress(f"{test}{count}, {threads} threads, {person.name}", 1)
                    sample = person.measure(test, count, threads, depth)
                    samples[person.name].append(sample)
                    about = {"test": test, "count": count, "threads": threads, "depth": depth, "round": number, "who": person.name}  # fmt: skip
                    _write(log, about | vars(sample))
            for who, values in samples.items():
                work = count * (n * k if test == "product" else macs)
                read = (values[0].nbytes or nbytes) if count == 1 or test == "tg" else None
                rows.append(_row(test, count, threads, depth, who, values, work, read))
    finally:
        for person in people:
            person.close()
    _add_ratios(rows, [f"tmexport {profile}" for profile in settings.profiles])
    return {
        "model": str(path), "type": problem.gguf.tensors[problem.name].type.name, "machine": describe(),
        "rounds": settings.repeats, "multiply_adds_per_token": macs, "product": {"name": problem.name, "n": n, "k": k},
        "participants": [{"name": p.name, "version": p.version} for p in people], "missing": missing, "rows": rows,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def measurements(settings: PeerSettings) -> int:
    """At most how many measurements there will be, for a progress bar."""
    texts, products = len(settings.profiles) + 2 + bool(settings.llama_bench), len(settings.profiles) + 4
    return settings.repeats * (2 * len(settings.threads) * texts + len(PRODUCTS) * products)


def multiply_adds(gguf: GGUFFile) -> int:
    """Of one token, in matrices: those of all blocks, and the head (the embedding, where they are one)."""
    model = config_from_metadata(gguf)
    blocks = sum(_size(t.shape) for t in model.tensors.values() if t.block is not None and (t.low_bit or t.matrix))
    return blocks + model.vocab_size * model.d_model


def token_bytes(gguf: GGUFFile) -> int:
    """Bytes that a decoded token must read or write: all tensors of the file (of an untied embedding nothing), and an fp32 state twice."""
    model = config_from_metadata(gguf)
    untied = "output.weight" in gguf.tensors
    weights = sum(t.nbytes for name, t in gguf.tensors.items() if not (untied and name == "token_embd.weight"))
    return weights + 8 * sum(
        spec.size for block in model.blocks for branch in block.branches for spec in branch.states()
    )


def _size(shape: Sequence[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


def _row(
    test: str, count: int, threads: int, depth: int, who: str, samples: Sequence[Sample], work: int, nbytes: int | None
) -> dict[str, Any]:
    rates = [count / sample.seconds for sample in samples]
    cpu = [sample.cpu_seconds for sample in samples if sample.cpu_seconds]
    seconds = count / median(rates)
    passes = count if test == "tg" else 1  # over the weights
    return {
        "test": f"{test}{count}" + (f" @ d{depth}" if depth else ""), "threads": threads, "who": who, "unit": "tokens/s", "median": median(rates),
        "lowest": min(rates), "highest": max(rates), "median_by_cpu_time": count / median(cpu) if cpu and threads == 1 else None,
        "gmacs_per_thread": work / seconds / threads / 1e9,
        "gigabytes_per_thread": None if nbytes is None else nbytes * passes / seconds / threads / 1e9,
        "error": samples[0].error,
    }  # fmt: skip


def _add_ratios(rows: list[dict[str, Any]], ours: Sequence[str]) -> None:
    """How many times as fast each of ours is, in every row of another's."""
    rates = {(row["test"], row["threads"], row["who"]): row["median"] for row in rows}
    for row in rows:
        own = {who: rates[row["test"], row["threads"], who] / row["median"] for who in ours}
        row["ratio"] = None if row["who"] in ours else own


def _write(log: IO[str], line: dict[str, Any]) -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    log.write(json.dumps(line | {"load_average": load}) + "\n")
    log.flush()
