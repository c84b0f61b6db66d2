"""What the runtime's commands share: errors as one line and an exit code, and the wait for the compiler."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import click

from runtime_ref.model import Model
from tmexport.errors import TmexportError
from tmexport.files import silence_stdout

DEMO_MODEL = (
    Path(__file__).parent / "demo" / "sotu.gguf"
)  # what the commands run when no model is named; see docs/demo-model.md


def run_command(command: click.Command, name: str) -> None:
    """Run a click command as a program: exit code 2 for usage, 1 for other errors, 130 for Ctrl-C; never a traceback."""
    try:
        code = command.main(prog_name=f"python -m {name}", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        code = 130
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
        code = 1
    except OSError as error:
        silence_stdout()
        click.echo(f"error: the output cannot be written: {error.strerror or error}", err=True)
        code = 1
    except MemoryError:
        click.echo("error: not enough memory for this model", err=True)
        code = 1
    except TmexportError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


def for_terminal(text: str) -> str:
    """What a stranger's model says, without the control characters that would reprogram a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def compile_kernels(model: Model) -> float:
    """Make the kernels ready, with a line on stderr if that takes longer than a second; returns the seconds."""
    start = time.perf_counter()
    notice = "compiling the kernels for this CPU (first run only, up to a minute) ..."
    timer = threading.Timer(1.0, lambda: click.echo(notice, err=True))
    timer.daemon = True
    timer.start()
    try:
        model.compile()
    finally:
        timer.cancel()
    seconds = time.perf_counter() - start
    if timer.finished.is_set() and seconds > 1.0:
        click.echo(f"compiled in {seconds:.1f} s", err=True)
    return seconds
