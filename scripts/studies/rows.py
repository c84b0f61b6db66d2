"""Rows of a study on many cores: a process of one thread each, every result handed over as soon as it is there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")


def results(
    work: Callable[[Key], Result], keys: Sequence[Key], jobs: int, minutes: float | None = None
) -> Iterator[Result]:
    """work(key) for every key, as they finish; what has not finished after so many minutes is given up.

    Args:
        work: picklable, and its results too. With several jobs it runs in fresh processes of one thread.
        keys: started in this order.
        jobs: processes at a time; with one, `work` runs in this process with the threads it has.
        minutes: None: no limit. With one job, no row starts after it.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    if jobs == 1:
        for key in keys:
            if end is not None and time.monotonic() > end:
                return
            yield work(key)
        return
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # read when they start
    # Fresh processes: a forked one can hang in the locks of the parent's thread pools.
    with multiprocessing.get_context("spawn").Pool(jobs, _begin) as pool:
        found = pool.imap_unordered(work, keys)
        for _ in keys:
            try:
                yield found.next(None if end is None else max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                return


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends the others
    torch.set_num_threads(1)
