"""The driver of scripts/faults/fuzz_*.py: a fuzzing campaign in a child process that may crash, counted and reported by the parent.

With atheris (pip install atheris) the search is guided by the coverage of tmexport's Python code; without it, valid files
are damaged at random. An input is a finding if it raises anything but our typed error, takes more than a second, or makes
the process hold more than four times its size (and 16 MB; 64 MB where native libraries allocate). Findings are kept and
the campaign goes on; a crash of the process is a finding and starts a new child.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[2]
SECONDS_PER_INPUT = 1.0
PYTHON_SLACK, NATIVE_SLACK = 16 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class Target:
    """Valid inputs, words of the format, and a function that says whether an input is accepted."""

    seeds: list[bytes]
    words: list[bytes]
    accepts: Callable[[bytes], bool]


@dataclass(frozen=True)
class Options:
    """How long to fuzz and with what: the options of the command."""

    seconds: float
    runs: int
    seed: int
    keep: Path | None
    engine: str | None
    child: Path | None


_OPTIONS = [
    click.option("--seconds", default=60.0, show_default=True, help="Length of the campaign."),
    click.option("--runs", default=0, show_default=True, help="Stop after this many executions; 0: no limit."),
    click.option("--seed", default=1, show_default=True, help="Seed of the random numbers."),
    click.option(
        "--keep", type=click.Path(path_type=Path), help="Folder for findings and corpus; else a temporary one."
    ),
    click.option("--engine", type=click.Choice(["atheris", "mutations"]), help="Default: atheris if it is installed."),
    click.option("--child", type=click.Path(path_type=Path), hidden=True),
]


def fuzz_command(function: Callable[..., None]) -> click.Command:
    """A click command whose function takes the fields of Options."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return click.command()(function)


def fuzz(name: str, load: Callable[[Path], Target], options: Options) -> None:
    """`load(scratch)` imports what is fuzzed (it runs under atheris's instrumentation) and returns the target."""
    if options.child:
        _child(options, load)
        return
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        sys.exit(_parent(name, options, (options.keep or Path(scratch)).resolve()))


def _parent(name: str, options: Options, work: Path) -> int:
    (work / "findings").mkdir(parents=True, exist_ok=True)
    began, total, crashes = time.monotonic(), {"executions": 0, "accepted": 0}, 0
    slowest, largest, engine = 0.0, 0, options.engine or _engine()
    while (left := options.seconds - (time.monotonic() - began)) > 1:
        runs = options.runs - total["executions"] if options.runs else 0
        if options.runs and runs <= 0:
            break
        command = [sys.executable, sys.argv[0], "--child", str(work), "--seconds", str(int(left)), "--runs", str(runs),
                   "--seed", str(options.seed + crashes), "--engine", engine]  # fmt: skip
        with open(work / "log", "ab") as log:
            code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
        if not (work / "state.json").exists():
            print((work / "log").read_text(), file=sys.stderr)
            return 1
        state = json.loads((work / "state.json").read_text())
        total = {key: total[key] + state[key] for key in total}
        slowest, largest = max(slowest, state["slowest_s"]), max(largest, state["largest_bytes"])
        if code == 0:
            break
        crashes += 1
        (work / "findings" / f"crash-{crashes}").write_bytes((work / "current").read_bytes())
        print(f"{name}: the process died with code {code}; the input is kept", file=sys.stderr)
        if crashes == 20:
            break
    findings = sorted(path.stem for path in (work / "findings").iterdir() if path.suffix != ".txt")
    result = {"target": name, "engine": engine, **total, "seconds": round(time.monotonic() - began, 1), "crashes": crashes,
              "findings": findings, "slowest_input_s": round(slowest, 3), "largest_python_peak_bytes": largest,
              "corpus": len(list((work / "corpus").glob("*"))), "kept_in": str(work) if options.keep else None}  # fmt: skip
    print(json.dumps(result))
    return 1 if findings else 0


def _engine() -> str:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return "mutations"
    return "atheris"


def _child(options: Options, load: Callable[[Path], Target]) -> None:
    os.environ["PYTHONHASHSEED"] = "0"
    os.environ["RUST_BACKTRACE"] = "0"  # a Rust panic would load debug symbols, 70 MB that are not the input's
    atheris: Any = None
    if options.engine == "atheris":
        atheris = importlib.import_module("atheris")
    work = options.child
    assert work is not None
    corpus = work / "corpus"
    corpus.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        with atheris.instrument_imports(include=["tmexport"]) if atheris else nullcontext():
            target = load(Path(scratch))
        for seed in target.seeds:
            (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
            assert target.accepts(seed), "a seed must be valid"
        watch = Watch(work, target)
        if atheris:
            escaped = ["".join(rf"\x{byte:02x}" for byte in word) for word in target.words if word]
            (work / "words").write_text("".join(f'"{word}"\n' for word in escaped))
            flags = [f"-max_total_time={int(options.seconds)}", f"-seed={options.seed}", "-max_len=40000", "-timeout=60", "-rss_limit_mb=0",
                     f"-dict={work / 'words'}", f"-artifact_prefix={work}/", str(corpus)]  # fmt: skip
            if options.runs:
                flags.insert(0, f"-runs={options.runs}")
            atheris.Setup([sys.argv[0], *flags], watch.execute)
            atheris.Fuzz()
        else:
            _mutate_for(options, target, watch)
    watch.save()


def _mutate_for(options: Options, target: Target, watch: Watch) -> None:
    from tests.hostile.mutate import mutate

    rng, until, runs = random.Random(options.seed), time.monotonic() + options.seconds, 0
    while time.monotonic() < until and (not options.runs or runs < options.runs):
        watch.execute(mutate(rng.choice(target.seeds), rng, target.words, rng.choice(target.seeds)))
        runs += 1


class Watch:
    """Runs one input after another and keeps the rules."""

    def __init__(self, work: Path, target: Target) -> None:
        self._work, self._target = work, target
        self._state = {"executions": 0, "accepted": 0, "slowest_s": 0.0, "largest_bytes": 0}
        self._saved = 0.0
        # The input that is running, in shared memory: it survives a crash of this process.
        self._current = open(work / "current", "wb", buffering=0)  # noqa: SIM115
        tracemalloc.start()
        self.save()

    def execute(self, data: bytes) -> None:
        self._current.seek(0)
        self._current.truncate()
        self._current.write(data)
        tracemalloc.reset_peak()
        before, resident = tracemalloc.get_traced_memory()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        try:
            self._state["accepted"] += self._target.accepts(data)
        except BaseException as error:  # a panic of a Rust library is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
            self._keep(place, data, traceback.format_exc())
        seconds = time.process_time() - began
        peak = tracemalloc.get_traced_memory()[1] - before
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
        if seconds > SECONDS_PER_INPUT:
            self._keep("slow", data, f"{seconds:.2f} s")
        if peak > 4 * len(data) + PYTHON_SLACK or grown > 4 * len(data) + NATIVE_SLACK:
            self._keep("memory", data, f"{len(data)} bytes in; peak {peak}, resident size grew by {grown}")
        self._state["executions"] += 1
        self._state["slowest_s"] = max(self._state["slowest_s"], seconds)
        self._state["largest_bytes"] = max(self._state["largest_bytes"], peak)
        if time.monotonic() - self._saved > 0.5:
            self.save()

    def _keep(self, place: str, data: bytes, text: str) -> None:
        stem = self._work / "findings" / place.replace("/", "_").replace(" ", "-")
        if not stem.with_suffix(".bin").exists():
            stem.with_suffix(".bin").write_bytes(data)
            stem.with_suffix(".txt").write_text(text)

    def save(self) -> None:
        (self._work / "state.json").write_text(json.dumps(self._state))
        self._saved = time.monotonic()
