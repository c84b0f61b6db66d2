"""Where threads wait for one another between the phases of a forward pass, and how they share work."""

from __future__ import annotations

from runtime_ref.kernels.compiled import kernel
from runtime_ref.kernels.intrinsics import atomic_add, atomic_load, atomic_store, sched_yield

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba

SPINS = 2000  # a few microseconds: longer than a phase's imbalance, far shorter than a time slice


@kernel
def barrier(sync, threads):
    """Wait until all threads are here. sync int64: [0] arrived, [8] generation."""
    if threads == 1:
        return
    generation = atomic_load(sync, 8)
    if atomic_add(sync, 0, 1) == threads - 1:
        atomic_store(sync, 0, 0)
        atomic_store(sync, 8, generation + 1)
    else:
        spins = 0
        while atomic_load(sync, 8) == generation:
            spins += 1
            if spins > SPINS:
                sched_yield()


@kernel
def share(total, tid, threads):
    """The part of 0..total that is thread tid's: first and end."""
    return tid * total // threads, (tid + 1) * total // threads
