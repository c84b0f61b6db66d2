"""Threads that all run one compiled function together; the caller is thread 0."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np


class Team:
    """`size` threads. `run(function, *args)` calls function(tid, size, sync, *args) on each.

    The function must release the GIL and end with a barrier on `sync`, so that all work is done when thread 0 returns.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.sync = np.zeros(16, np.int64)
        self._queues: list[SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None]] = []
        for tid in range(1, size):
            queue: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
            threading.Thread(target=self._work, args=(tid, queue), daemon=True, name=f"runtime_ref-{tid}").start()
            self._queues.append(queue)

    def run(self, function: Callable[..., Any], *args: Any) -> None:
        if len(self._queues) != self.size - 1:  # the function would wait for the others for ever
            raise RuntimeError("the model is closed")
        for queue in self._queues:
            queue.put((function, args))
        function(0, self.size, self.sync, *args)

    def close(self) -> None:
        """Let the threads end; the team cannot run again."""
        for queue in self._queues:
            queue.put(None)
        self._queues = []

    def _work(self, tid: int, queue: SimpleQueue[tuple[Callable[..., Any], tuple[Any, ...]] | None]) -> None:
        while (job := queue.get()) is not None:
            job[0](tid, self.size, self.sync, *job[1])
            del job
