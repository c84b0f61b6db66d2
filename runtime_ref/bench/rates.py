"""How fast this machine multiplies when nothing comes from memory: the other yardstick beside `bandwidth`."""

from __future__ import annotations

import time

import numpy as np

from runtime_ref.arithmetic import preset_of
from runtime_ref.kernels.barrier import barrier
from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.isa import select
from runtime_ref.kernels.matmul import multiply
from runtime_ref.kernels.packed import Packed, aligned
from runtime_ref.kernels.packed.ternary import PackedTernary
from runtime_ref.kernels.scratch import Room, Scratch, allocate
from runtime_ref.team import Team

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

ROWS, K, BLOCK = 256, 2048, 256  # 128 KB of codes a thread: stays in a second-level cache
MANY_ROWS = 2048  # as in a projection: what is done once for all rows counts little


@cached(nogil=True)
def _multiply_often(tid, threads, sync, isa, profile, packed, s, rows, k, block, out, times):
    for _ in range(times):
        multiply(isa, profile, packed, s, rows, k, block, out, False, tid, threads)
    barrier(sync, threads)


def ternary_rate(profile: str, threads: int, tokens: int = 1) -> float:
    """Multiplications of a ternary weight and an activation a second, all threads together, the weights in cache.

    Args:
        profile: the name of a preset.
        threads: that work at the same time, each on weights of its own.
        tokens: multiplied with a weight once it is loaded: 1 as in decoding, CHUNK as in reading a prompt.
    """
    rows = (ROWS if tokens == 1 else MANY_ROWS) * threads
    codes = aligned((rows // 16, K // 16, 16, 4), np.dtype(np.uint8))
    codes[...] = 0x55  # every weight 0; the time does not depend on it
    scales = np.full((rows // 16, K // BLOCK, 16), 0x3C00, np.uint16)
    return multiply_rate(PackedTernary(codes, scales), profile, rows, BLOCK, threads, tokens)


def multiply_rate(packed: Packed, profile: str, rows: int, block: int, threads: int, tokens: int) -> float:
    """The same for any packed matrix [rows, K]; the best of several short runs, so that an interruption does not count."""
    scratch = product_scratch(tokens, K)
    out = np.zeros((tokens, rows), np.float32)
    team, isa, how = Team(threads), select(), preset_of(profile).activations
    work = rows * K * tokens
    times = max(1, round(2e7 * threads / work))
    best = np.inf
    try:
        for _ in range(100):
            start = time.perf_counter()
            team.run(_multiply_often, isa, how, packed, scratch, tokens, K, block, out, times)
            best = min(best, time.perf_counter() - start)
    finally:
        team.close()
    return work * times / best


def product_scratch(rows: int, k: int) -> Scratch:
    """Working arrays for products of `rows` rows of k values."""
    return allocate(rows, Room(wide=k))
