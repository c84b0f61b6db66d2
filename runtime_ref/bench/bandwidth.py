"""How fast this machine reads memory: the yardstick for decoding."""

from __future__ import annotations

import time

import numpy as np

from runtime_ref.kernels.barrier import barrier
from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.vector import load, splat, tree_sum
from runtime_ref.team import Team

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

_ZERO = np.int32(0)


@cached(nogil=True)
def _read(tid, threads, sync, words, sums):
    """Sum this thread's share of int32 `words` (a multiple of 64 a thread), four vectors at a time."""
    share = words.shape[0] // threads // 64 * 64
    a, b, c, d = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    for i in range(tid * share, (tid + 1) * share, 64):
        a = a + load(words, i)
        b = b + load(words, i + 16)
        c = c + load(words, i + 32)
        d = d + load(words, i + 48)
    sums[tid * 16] = tree_sum(a + b + c + d)
    barrier(sync, threads)


def read_bandwidth(threads: int, n_bytes: int = 2**28, repeats: int = 7) -> float:
    """Bytes a second that `threads` threads read from memory together; the best of `repeats` passes over `n_bytes`."""
    words, sums = np.ones(n_bytes // 4, np.int32), np.zeros(16 * threads, np.int32)
    team = Team(threads)
    _read(0, 1, team.sync, words[:64], sums)  # compiles
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        team.run(_read, words, sums)
        best = min(best, time.perf_counter() - start)
    team.close()
    return n_bytes / best
