"""Reading tokens that may turn out wrong: the recurrent states stay as they were, and what was right is applied afterwards.

Two more programs of the same phases. `trial` works on copies of the states, a layer's made just before its scan reads it, and
keeps what every convolution and scan reads of a token: little beside a state. `replay` gives that to them once more, for the
tokens that were right. States that grow need neither: what lies beyond the tokens that count is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime_ref.arithmetic import StateArray
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined
from runtime_ref.kernels.phases import DT, MID
from runtime_ref.kernels.program import Program, Step
from runtime_ref.kernels.vector import peek, poke

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba

_LINE = 64  # bytes of a vector


class Copy(NamedTuple):
    """`nbytes` (whole vectors) behind `offset` of the state with this number, from the address in `origin` uint64 [arrays]."""

    origin: np.ndarray
    slot: int
    offset: int
    nbytes: int


class Carry(NamedTuple):
    """`count` values from column `first` of a scratch array (`phases`: PROJ, MID, DT), to or (`back`) from column `at` of
    kept fp32 [rows, width].
    """

    kept: np.ndarray
    source: int
    first: int
    count: int
    at: int
    back: int


@inlined
def copy_state(tid, threads, job, a):
    origin, target = np.int64(a.origin[a.slot]) + a.offset, np.int64(job.states[a.slot, 0]) + a.offset
    low, high = share(a.nbytes // _LINE, tid, threads)
    for at in range(_LINE * low, _LINE * high, _LINE):
        poke(target + at, peek(origin + at))


@inlined
def carry_rows(tid, threads, job, a):
    array = job.s.mid if a.source == MID else job.s.dt if a.source == DT else job.s.proj
    for r in range(tid, job.rows, threads):
        for i in range(a.count):
            if a.back:
                array[r, a.first + i] = a.kept[r, a.at + i]
            else:
                a.kept[r, a.at + i] = array[r, a.first + i]


@dataclass(frozen=True)
class Replay:
    """origin uint64 [arrays]: where `trial` finds each array of the state, set before it runs; rows: the most tokens.

    replay: None if every state grows.
    """

    trial: Program
    replay: Program | None
    origin: np.ndarray
    rows: int


def programs(steps: Sequence[Step], arrays: Sequence[StateArray], rows: int) -> Replay:
    """The two programs for a model of these steps and arrays of its state, for at most so many tokens."""
    origin = np.zeros(len(arrays), np.uint64)
    width = sum(span.count for step in steps for span in step.inputs)
    kept, at = np.zeros((rows, width), np.float32), 0
    trial: list[Step] = []
    again: list[Step] = []
    for step in steps:
        for span in step.inputs:
            carry = Carry(kept, span.source, span.first, span.count, at, 0)
            trial.append(Step(carry_rows, carry))
            again.append(Step(carry_rows, carry._replace(back=1)))
            at += span.count
        if step.inputs:
            again.append(step)
            for slot in step.updates:
                nbytes = arrays[slot].nbytes // arrays[slot].shape[0]
                trial.append(Step(copy_state, Copy(origin, slot, step.args.index * nbytes, nbytes)))
        trial.append(step)
    return Replay(Program(trial), Program(again) if again else None, origin, rows)
