"""Progress bars on stderr, and the one place that turns errors into exit codes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tmexport.errors import TmexportError
from tmexport.files import silence_stdout


@dataclass(frozen=True)
class Bar:
    """A progress bar that is running."""

    progress: Progress
    task: TaskID

    def advance(self, amount: float) -> None:
        self.progress.advance(self.task, amount)

    def update(self, completed: float, note: str) -> None:
        self.progress.update(self.task, completed=completed, note=note)


@contextlib.contextmanager
def progress_bar(title: str, total: float | None, unit: str = "", shown: bool = True) -> Iterator[Bar]:
    """A bar on stderr, moving to and fro if the total is None; on what is no terminal only its final state appears."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4, disable=not shown) as progress:
        yield Bar(progress, progress.add_task(title, total=total, note=unit))


def run_command(command: click.Command) -> None:
    """Run a click command as a program: one line for an error, exit code 2 for usage, 1 for others, 130 for Ctrl-C."""
    try:
        code = command.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except KeyboardInterrupt:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except MemoryError:
        click.echo("error: out of memory; choose a smaller --batch-size or --seq-len", err=True)
        code = 1
    except OSError as error:  # the metrics, or stdout
        silence_stdout()
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"error: {where}{error.strerror or error}", err=True)
        code = 1
    except TmexportError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
