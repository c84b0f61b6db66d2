"""The one progress bar, on stderr; rich is imported when the first bar appears."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar:
    """A bar that is running."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, done: float = 1, what: str | None = None) -> None:
        """So much more is done; `what` is being done now, if that changes."""
        self._update(advance=done, description=what)

    def update(self, completed: float, note: str) -> None:
        """So much is done in all; a note beside the bar."""
        self._update(completed=completed, note=note)

    def advance_of(self, total: float) -> None:
        """One more is done, of a total that is known only now."""
        self._update(advance=1, total=total)

    def _update(self, **changes: Any) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, **changes)


@contextmanager
def progress_bar(
    what: str, total: float | None, unit: str = "", keep: bool = False, shown: bool = True
) -> Iterator[Bar]:
    """A bar on stderr, moving to and fro if the total is None.

    It disappears when done and where stderr is no terminal; with `keep` its final state stays, there too.
    """
    stderr = sys.stderr
    if not shown or stderr is None or not (keep or stderr.isatty()):
        yield Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=not keep, refresh_per_second=4) as progress:
        yield Bar(progress, progress.add_task(what, total=total, note=unit))
