"""The demo's steps as subprocesses that are done once: a step is reused while its command, inputs and outputs are unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tmexport.errors import TmexportError
from tmexport.files import atomic_write


class StepFailedError(TmexportError):
    """A command of the demo failed; its own message stands above."""


@dataclass(frozen=True)
class Step:
    """One command.

    name: of its record, unique. command: its words; `tmexport` and `python` are those of this environment.
    inputs and outputs: files, or folders with everything in them; an output that is a folder belongs to this step alone.
    capture: the output file that receives the JSON object the command prints on stdout, or None if its stdout is shown.
    summary: one line for the user out of that object.
    resumable: the command understands --resume and goes on from what an interrupted run left in its folder.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    capture: Path | None = None
    summary: Callable[[dict[str, Any]], str] | None = None
    resumable: bool = False

    @property
    def shown(self) -> str:
        """The command as a user would type it."""
        return shlex.join(self.command)

    @property
    def printed(self) -> dict[str, Any]:
        """The JSON object that the command printed as its last line.

        Raises:
            StepFailedError: it printed something else.
        """
        assert self.capture is not None
        try:
            value = json.loads(self.capture.read_text(encoding="utf-8").strip().split("\n")[-1])
        except (OSError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise StepFailedError(
                f"{self.shown}: expected it to print one JSON object; what it printed is in {self.capture}"
            )
        return value


_SCRATCH = {"cache", "checkpoints"}  # folders in a training's output that may be deleted once it is finished


def _files_of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and not _SCRATCH & set(p.relative_to(path).parts))


def content_hash(paths: Sequence[Path]) -> str | None:
    """SHA-256 over the names and contents of the files, and of the files in the folders; None if a path is missing.

    A training's caches and checkpoints do not count.
    """
    digest = hashlib.sha256()
    for path in paths:
        if not path.exists():
            return None
        for file in _files_of(path):
            name = str(file.relative_to(path)) if path.is_dir() else path.name
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


class Records:
    """What was done with what, one small JSON file a step in `folder`: "started" before a step runs, "done" after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str) -> dict[str, Any]:
        try:
            raw = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return raw if isinstance(raw, dict) else {}

    def write(self, name: str, record: dict[str, Any]) -> None:
        with atomic_write(self.folder / f"{name}.json") as file:
            file.write(json.dumps(record, indent=1).encode())

    def seconds(self, name: str) -> float:
        """How long the step took when it ran, all its attempts together."""
        return float(self.read(name).get("seconds", 0.0))


def run_step(step: Step, records: Records, say: Callable[[str], None]) -> None:
    """Run the step, resume it, or reuse its outputs; `say` receives one line about what happens.

    Raises:
        StepFailedError: the command failed.
        KeyboardInterrupt: the user interrupted; the command was told so, and has ended.
    """
    wanted = {"command": list(step.command), "inputs": content_hash(step.inputs)}
    record = records.read(step.name)
    same = all(record.get(key) == value for key, value in wanted.items())
    if same and record.get("outputs") == content_hash(step.outputs) and record.get("outputs") is not None:
        say(f"{_told(step)}unchanged, reused (it took {duration(records.seconds(step.name))})")
        return
    command, before = list(step.command), 0.0
    if step.resumable and same and "outputs" not in record and any(path.exists() for path in step.outputs):
        command.append("--resume")
        before = records.seconds(step.name)
        say("going on where it was interrupted")
    else:
        _remove(step.outputs)
    for path in step.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    records.write(step.name, wanted | {"seconds": before})
    began = time.monotonic()
    try:
        printed = run_command(command, capture=step.capture is not None)
    finally:
        seconds = before + time.monotonic() - began
        records.write(step.name, wanted | {"seconds": seconds})
    if step.capture is not None:
        with atomic_write(step.capture) as file:
            file.write(printed)
    outputs = content_hash(step.outputs)
    if outputs is None:
        missing = next(path for path in step.outputs if not path.exists())
        raise StepFailedError(f"{step.shown}: ended without writing {missing}")
    records.write(step.name, wanted | {"seconds": seconds, "outputs": outputs})
    say(f"{_told(step)}done in {duration(seconds)}")


def _told(step: Step) -> str:
    return f"{step.summary(step.printed)}; " if step.summary else ""


def run_command(command: Sequence[str], capture: bool) -> bytes:
    """Run a command of this environment; its stderr (progress bars) is ours. Returns its stdout if `capture`.

    Raises:
        StepFailedError: it ended with another exit code than 0.
        KeyboardInterrupt: we were interrupted; the command was interrupted too, and has ended.
    """
    program = Path(sys.executable).parent / command[0]
    # Threads that wait by spinning make each other wait on a machine that has other work too: 5 times slower, measured.
    environment = {"GOMP_SPINCOUNT": "10000"} | os.environ
    # A group of its own, so that Ctrl-C reaches it exactly once: through us.
    with _terminated_like_interrupted():
        process = subprocess.Popen(
            [str(program), *command[1:]],
            stdout=subprocess.PIPE if capture else None,
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=0,
        )
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            _interrupt(process)
            raise
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if process.returncode:
        raise StepFailedError(f"{shlex.join(command)}: ended with exit code {process.returncode}; its message is above")
    return printed or b""


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP stop it as Ctrl-C does, so that no command outlives us."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(process: subprocess.Popen[bytes], patience: float = 30.0) -> None:
    """Ask the command to stop, give it time to save, then insist."""
    for number, wait in ((signal.SIGINT, patience), (signal.SIGKILL, None)):
        if process.poll() is None:
            os.killpg(process.pid, number)
        try:
            process.communicate(timeout=wait)
            return
        except subprocess.TimeoutExpired:
            continue


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def duration(seconds: float) -> str:
    """7 s, 2 min 05 s."""
    whole = round(seconds)
    return (
        f"{seconds:.1f} s" if seconds < 10 else f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
    )
