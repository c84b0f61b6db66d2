"""What the runtime's commands share: the demo model, text for a terminal, and the wait for the compiler."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import click

from runtime_ref.kernels.scratch import CHUNK
from runtime_ref.model import Model

DEMO_MODEL = (
    Path(__file__).parent / "demo" / "sotu.gguf"
)  # what the commands run when no model is named; see docs/demo-model.md


def for_terminal(text: str) -> str:
    """What a stranger's model says, without the control characters that would reprogram a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def compile_kernels(model: Model, tokens: int = CHUNK) -> float:
    """Make the kernels for prompts of so many tokens ready, with a line on stderr if that takes longer than a second; returns the seconds."""
    start = time.perf_counter()
    notice = "compiling the kernels for this CPU (first run only, up to a minute) ..."
    timer = threading.Timer(1.0, lambda: click.echo(notice, err=True))
    timer.daemon = True
    timer.start()
    try:
        model.compile(tokens)
    finally:
        timer.cancel()
    seconds = time.perf_counter() - start
    if timer.finished.is_set() and seconds > 1.0:
        click.echo(f"compiled in {seconds:.1f} s", err=True)
    return seconds
