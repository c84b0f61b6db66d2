"""Threads that all run one compiled function together; the caller is thread 0.

The kernel at times leaves two of them on one core while another is idle. So while no other program wants the cores, each keeps to
CPUs of its own, the caller only for as long as the function runs. On a busy machine they are left free: a thread that
may not leave a core that it shares keeps all others waiting (2 to 4 times as slow, measured).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from tmexport.threads import own_cpus, running

LOOK = 0.1  # seconds between two looks at how busy the machine is
Job = tuple[Callable[..., Any], tuple[Any, ...]]


class Team:
    """`size` threads. `run(function, *args)` calls function(tid, size, sync, *args) on each.

    The function must release the GIL and end with a barrier on `sync`, so that all work is done when thread 0 returns.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sync = np.zeros(16, np.int64)
        self._queues: list[SimpleQueue[Job | None]] = []
        self._binding = _Binding(size)
        for tid in range(1, size):
            queue: SimpleQueue[Job | None] = SimpleQueue()
            thread = threading.Thread(target=self._work, args=(tid, queue), daemon=True, name=f"runtime_ref-{tid}")
            thread.start()
            self._binding.helpers.append(thread.native_id or 0)
            self._queues.append(queue)

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        if len(self._queues) != self.size - 1:  # the function would wait for the others for ever
            raise RuntimeError("the model is closed")
        with self._binding:
            for queue in self._queues:
                queue.put((function, args))
            function(0, self.size, self.sync, *args)

    def close(self) -> None:
        """Let the threads end; the team cannot run again."""
        for queue in self._queues:
            queue.put(None)
        self._queues = []

    def _work(self, tid: int, queue: SimpleQueue[Job | None]) -> None:
        while (job := queue.get()) is not None:
            job[0](tid, self.size, self.sync, *job[1])
            del job


class _Binding:
    """While entered: the threads on CPUs of their own, if there are as many idle ones. helpers: the system's thread ids, in order."""

    def __init__(self, size: int) -> None:
        self.helpers: list[int] = []
        self._cpus = own_cpus(size)
        self._look_again = 0.0
        self._bound = False  # the helpers stay bound from run to run
        self._before: set[int] | None = None  # the caller's CPUs, while it runs bound

    def __enter__(self) -> None:
        if self._cpus is None:
            return
        with contextlib.suppress(
            OSError
        ):  # a CPU has been taken away, or a sandbox forbids it: they stay where they are
            if time.monotonic() >= self._look_again:
                self._look_again = time.monotonic() + LOOK
                self._look(self._cpus)
            if self._bound:
                self._before = os.sched_getaffinity(0)
                os.sched_setaffinity(0, self._cpus[0])

    def _look(self, own: list[set[int]]) -> None:
        """Bind the helpers if as many CPUs are idle as there are threads, else let them go everywhere."""
        every, now = set.union(*own), running()
        wanted = now is not None and now - 1 + len(own) <= len(every)
        if wanted != self._bound:
            for helper, cpus in zip(self.helpers, own[1:], strict=True):
                os.sched_setaffinity(helper, cpus if wanted else every)
            self._bound = wanted

    def __exit__(self, *_: object) -> None:
        if self._before:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, self._before)
            self._before = None
