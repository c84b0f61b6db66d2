"""What the runtime's commands share: the demo model, text for a terminal, and the wait for the compiler."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from runtime_ref.arithmetic import DEFAULT, PRESETS
from runtime_ref.arithmetic import HELP as PRESET_HELP
from runtime_ref.kernels.scratch import CHUNK
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling

DEMO_MODEL = (
    Path(__file__).parent / "demo" / "sotu.gguf"
)  # what the commands run when no model is named; see docs/demo-model.md


profile_option = click.option(
    "--profile", type=click.Choice(list(PRESETS)), default=DEFAULT, show_default=True, help=PRESET_HELP
)


def sampling_options(temperature: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Four options, of which the command gets one argument: `sampling`. temperature: if none is given."""
    options = (
        click.option("--temperature", type=float, default=temperature, show_default=True, help="0: always the most likely token."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens of this total probability."),
        click.option("--top-k", type=int, default=0, show_default=True, help="Keep this many tokens; 0 keeps all."),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random choice."),
    )  # fmt: skip

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_sampling(*args: Any, temperature: float, top_p: float, top_k: int, seed: int, **others: Any) -> None:
            command(*args, sampling=Sampling(temperature, top_k, top_p, seed), **others)

        result: Callable[..., None] = with_sampling
        for option in reversed(options):
            result = option(result)
        return result

    return decorate


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
