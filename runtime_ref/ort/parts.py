"""How the threads of onnxruntime share the phases of a call, and the calls of functions by their address."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from runtime_ref.kernels.barrier import SPINS
from runtime_ref.kernels.compiled import kernel, stack
from runtime_ref.kernels.intrinsics import atomic_add, atomic_load, sched_yield
from runtime_ref.kernels.phases import FEWEST_ROWS
from runtime_ref.kernels.program import STEP_WORDS
from runtime_ref.kernels.records import words_at
from runtime_ref.ort.interface import PARALLEL_FOR

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

MALLOC, FREE, SPARE, TASK, IS_ALIVE, ENSURE, RELEASE, FORGET = range(8)  # of Kernel.calls
MOST_STEPS = 8
# Words of what the threads of a call share: table, steps, job; a step's parts; and on a cache line each, how many were taken and done
TABLE, STEPS, JOB_AT, PARTS, TAKEN = 0, 1, 2, 8, 16
DONE = TAKEN + 8 * MOST_STEPS
BOARD_WORDS = DONE + 8 * MOST_STEPS
BOARD_BYTES = 8 * BOARD_WORDS


@intrinsic
def call(typingctx, function, arguments):
    """A C function by its address: a tuple of words to a word."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(64)
        values = cgutils.unpack_tuple(builder, args[1])
        values = [context.cast(builder, v, kind, types.int64) for v, kind in zip(values, arguments.types, strict=True)]
        pointer = ir.FunctionType(word, [word] * len(values)).as_pointer()
        return builder.call(builder.inttoptr(args[0], pointer), values)

    return types.int64(types.int64, arguments), codegen


@intrinsic
def swap(typingctx, address, value):
    """Put a word at an address, and return the one that was there, as one step."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("xchg", builder.inttoptr(args[0], ir.IntType(64).as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@kernel
def ask(k, number, arguments):
    """A function of onnxruntime's interface."""
    return call(words_at(k.interface, number + 1)[number], arguments)


@kernel
def run_steps(k, context, job_at, rows):
    """All phases, each on as many threads as it has work for; returns a status."""
    board_at, most = stack(BOARD_BYTES), 1
    board = words_at(board_at, BOARD_WORDS)
    table = k.many if rows >= FEWEST_ROWS else k.few
    board[TABLE], board[STEPS], board[JOB_AT] = np.int64(table.ctypes.data), table.shape[0], job_at
    for step in range(table.shape[0]):
        parts = min(k.threads, rows) if k.by_rows[step] else k.threads
        most = max(most, parts)
        board[PARTS + step], board[TAKEN + 8 * step], board[DONE + 8 * step] = parts, 0, 0
    if most > 1:
        return ask(k, PARALLEL_FOR, (context, k.calls[TASK], most, 0, board_at))
    work(board_at)
    return np.int64(0)


@kernel
def work(board_at):
    """Take parts of all phases, one phase after the other, until there are none.

    Any number of threads may come, at any time: a thread waits for parts alone that a running thread has taken. (onnxruntime may give a
    thread to another run first, so that one which waited for all to come could wait for ever.)
    """
    board = words_at(board_at, BOARD_WORDS)
    table = words_at(board[TABLE], STEP_WORDS * MOST_STEPS)
    for step in range(board[STEPS]):
        parts, taken, done = board[PARTS + step], TAKEN + 8 * step, DONE + 8 * step
        part = atomic_add(board, taken, 1)
        while part < parts:
            call(table[STEP_WORDS * step], (part, parts, board[JOB_AT], table[STEP_WORDS * step + 1]))
            atomic_add(board, done, 1)
            part = atomic_add(board, taken, 1)
        spins = 0
        while atomic_load(board, done) < parts:
            spins += 1
            if spins > SPINS:
                sched_yield()
