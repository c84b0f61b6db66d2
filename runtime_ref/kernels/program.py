"""A forward pass as a program: phases that all threads run one after the other, each compiled and kept on the disk by itself.

A phase is a compiled function of (thread, threads, job, arguments), the last two given by address (`records`): so the engine
calls every one alike, whatever it reads, layers may differ in kind and type, and what two models, layers or presets have in
common is compiled once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.kernels.barrier import barrier
from runtime_ref.kernels.cache import cached, source_digest
from runtime_ref.kernels.compiled import OPTIONS
from runtime_ref.kernels.records import type_of, words
from runtime_ref.kernels.scratch import Scratch

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

STEP_WORDS = 3  # of a phase in `Program.table`
_CALLED_WITH = (types.int64, types.int64, types.uint64, types.uint64)


class Job(NamedTuple):
    """One call: `sequences` texts of `length` tokens each, a row a token, text by text.

    wanted: rows of logits, which are all, or the last of each text; tokens int64 [rows]; states uint64 [arrays, sequences]:
    the addresses of each text's arrays; logits fp32 [wanted, vocab]; past, room int64 [sequences]: tokens read before, and
    positions that the arrays have which grow; scores fp32 [threads, 16 times positions and up to 16 more]:
    of 16 heads of one token, or one head of 16.
    """

    rows: int
    sequences: int
    length: int
    wanted: int
    tokens: np.ndarray
    states: np.ndarray
    logits: np.ndarray
    past: np.ndarray
    room: np.ndarray
    scores: np.ndarray
    s: Scratch


class Span(NamedTuple):
    """`count` values of a row of a scratch array (`phases`: PROJ, MID, DT) from column `first`."""

    source: int
    first: int
    count: int


@dataclass(frozen=True)
class Step:
    """One phase: compiled code, `inlined` (tid, threads, job, args), and what it reads; `many`: the code for many rows.

    apart: it and the next step neither read nor write what the other writes, so that no thread waits between them.
    Of one that updates a state which does not grow: updates, the numbers of its arrays, and inputs, what it reads of a token
    that no such step before it made (`replay`).
    """

    body: Any
    args: Any
    many: Any = None
    apart: bool = False
    updates: Sequence[int] = ()
    inputs: Sequence[Span] = ()


@intrinsic
def _call(typingctx, function, tid, threads, job, args):
    def codegen(context, builder, sig, arguments):
        word = ir.IntType(64)
        pointer = ir.FunctionType(ir.VoidType(), [word] * 4).as_pointer()
        builder.call(builder.inttoptr(arguments[0], pointer), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.uint64, *_CALLED_WITH), codegen


def _compiled(digest: int) -> Callable[..., None]:
    @cached(nogil=True)
    def run(tid, threads, sync, program, job):
        """Every thread calls this with its own tid. program: `Program.table`; job: the address of a Job's words."""
        for step in range(program.shape[0]):
            _call(program[step, 0], tid, threads, np.uint64(job), program[step, 1])
            if not program[step, 2]:
                barrier(sync, threads)

    return run


run = _compiled(source_digest())


class Entry(NamedTuple):
    """A phase as the engine calls it: its function, and the types it is compiled for, records by their addresses."""

    code: Any
    signature: tuple[types.Type, ...]

    @property
    def known(self) -> bool:
        """Whether its machine code is in this process or on the disk."""
        return bool(self.code.overloads) or self.code._cache.holds(self.signature)


@cache
def _entry(body: Any, job: types.Type, args: types.Type) -> Entry:
    of = body.py_func
    function = FunctionType(of.__code__, of.__globals__, of.__name__, of.__defaults__, of.__closure__)
    made_for = [cell.cell_contents for cell in of.__closure__ or ()]
    about = (of.__module__, str(of.__code__.co_firstlineno), repr(made_for), repr(job), repr(args))
    # Symbols of what is read from the disk meet in one process, and Numba tells them apart by names and types only
    function.__qualname__ = f"phase_{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"
    function.__module__ = of.__module__
    kept = cached(about=about, **(OPTIONS | {"no_cfunc_wrapper": False}))(function)
    return Entry(kept, (types.int64, types.int64, job, args))


class Program:
    """Steps, ready for `run`."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self._steps = tuple(steps)
        records = [np.array(list(words(step.args)), np.uint64) for step in self._steps]
        self._words = np.concatenate(records)
        starts = np.cumsum([0, *(len(record) for record in records[:-1])])
        self._arguments = np.uint64(self._words.ctypes.data) + np.uint64(8) * starts.astype(np.uint64)
        self._apart = np.array([step.apart for step in self._steps], np.uint64)
        self._tables: dict[bool, np.ndarray] = {}
        self._found: dict[bool, bool] = {}

    def at_hand(self, many: bool, job: Job) -> bool:
        """Whether `table` finds everything compiled, in this process or, looked for once, on the disk."""
        if many not in self._tables and many not in self._found:
            entries = set(self._entries(many, job))
            self._found[many] = all(entry.known for entry in entries)
        return many in self._tables or self._found[many]

    def table(self, many: bool, job: Job) -> np.ndarray:
        """Of each phase the addresses of code and arguments, and `apart`: uint64 [steps, STEP_WORDS], for jobs of many rows or of few; compiled if need be."""
        if many not in self._tables:
            code = np.array([_address(entry) for entry in self._entries(many, job)], np.uint64)
            self._tables[many] = np.stack([code, self._arguments, self._apart], axis=1)
        return self._tables[many]

    def _entries(self, many: bool, job: Job) -> list[Entry]:
        kind = type_of(job)
        return [_entry((many and step.many) or step.body, kind, type_of(step.args)) for step in self._steps]


def _address(entry: Entry) -> int:
    """Where the machine code of a phase is, compiled or read from the disk first."""
    entry.code.compile(entry.signature)
    result = entry.code.overloads[entry.signature]
    return result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)
