"""What onnxruntime calls: one compiled function for every operator, without Python and without copies.

An operator is a `Kernel`: what its inputs must be, what its outputs are, where in a Job each goes, and the engine's phases. A call fills
a Job with the addresses that onnxruntime gives, and runs the phases on onnxruntime's threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import types

from runtime_ref.kernels.attend import MOST_WIDTH
from runtime_ref.kernels.cache import cached, source_digest
from runtime_ref.kernels.compiled import OPTIONS, kernel, stack
from runtime_ref.kernels.program import Job
from runtime_ref.kernels.records import Record, read, type_of, words_at
from runtime_ref.kernels.scratch import Room, allocate
from runtime_ref.ort.interface import (
    CREATE_STATUS,
    DIMENSIONS,
    DIMENSIONS_COUNT,
    INPUT,
    INVALID_ARGUMENT,
    OUTPUT,
    RELEASE_TENSOR_INFO,
    TENSOR_DATA,
    TENSOR_INFO,
)
from runtime_ref.ort.parts import (
    ENSURE,
    FORGET,
    FREE,
    IS_ALIVE,
    MALLOC,
    RELEASE,
    SPARE,
    ask,
    call,
    run_steps,
    swap,
    work,
)

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

# Dimensions that a call decides: of an input or an output
BATCH, TIME, POSITIONS, WIDTH, GROUPS, INNER = range(-1, -7, -1)  # the size of a code lies at SIZES + code
SIZES = 6
# Where an array of a Job comes from; and its rows: as many as the call takes at once, the same in sixteens, threads, texts
FROM_INPUT, FROM_OUTPUT, FROM_SCRATCH = 0, 1, 2
ROWS, SIXTEENS, THREADS, TEXTS = 0, 1, 2, 3
SCORES = -SIZES - 1  # a width that depends on the positions
RANK, MOST_TENSORS, JOB_WORDS = 4, 8, 128
SHAPE_BYTES, PLACES_BYTES, JOB_BYTES, SIZES_BYTES = 8 * RANK, 8 * MOST_TENSORS, 8 * JOB_WORDS, 8 * SIZES


class Kernel(NamedTuple):
    """A node of the graph.

    interface: the address of OrtApi; calls int64: addresses (MALLOC, ...); owner: the Python object that keeps all this; threads: parts of
    a phase; chunk: rows at a time, 0 for all. inputs int64 [.., 3 + RANK]: number, address of what to say of another shape, rank, dimensions.
    outputs int64 [.., 1 + RANK]: rank, dimensions. job int64: a Job's words. wires int64 [.., 6]: word of the job, source, its number, rows,
    width, bytes of an element. few, many uint64 [steps, STEP_WORDS]: `Program.table`; by_rows int64 [steps]: 1 if one thread does a row.
    carried int64 [.., 3]: input, output and bytes a text of a state: where a call takes some rows at a time, the next ones of a text go on
    from what was written.
    """

    interface: int
    owner: int
    threads: int
    chunk: int
    calls: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    job: np.ndarray
    wires: np.ndarray
    few: np.ndarray
    many: np.ndarray
    by_rows: np.ndarray
    carried: np.ndarray


def empty_job() -> Job:
    """What a Job's words are before a call."""
    none, word, s = np.zeros((0, 0), np.float32), np.zeros(1, np.int64), allocate(1, Room())
    return Job(
        0,
        0,
        0,
        0,
        np.zeros(0, np.int64),
        np.zeros((MOST_TENSORS, 1), np.uint64),
        none,
        word,
        np.zeros(SIZES, np.int64),
        none,
        s,
    )


JOB = type_of(empty_job())
assert isinstance(JOB, Record)
_SCRATCH = JOB.first_word("s")


def word_of(field: str) -> int:
    """Where in a Job's words a field begins, one of its Scratch's too."""
    assert isinstance(JOB, Record)
    scratch = JOB.fields["s"]
    assert isinstance(scratch, Record)
    return _SCRATCH + scratch.first_word(field) if field in scratch.fields else JOB.first_word(field)


_ROWS, _SEQUENCES, _LENGTH, _WANTED, _STATES, _PAST, _POSITIONS = map(
    word_of, ("rows", "sequences", "length", "wanted", "states", "past", "room")
)
BAD = word_of("bad")
_NONE = np.zeros((0, 0), np.int64)
_KERNEL = type_of(Kernel(0, 0, 0, 0, _NONE.reshape(-1), _NONE, _NONE, _NONE.reshape(-1), _NONE, *[_NONE.astype(np.uint64)] * 2, _NONE.reshape(-1), _NONE))  # fmt: skip


@kernel
def dimensions(k, value, found):
    """The rank of a tensor, and its dimensions to the address `found`; -1 if there are more than fit."""
    at = stack(16)
    room = words_at(at, 2)
    ask(k, TENSOR_INFO, (value, at))
    ask(k, DIMENSIONS_COUNT, (room[0], at + 8))
    rank = room[1]
    if rank > RANK:
        rank = -1
    else:
        ask(k, DIMENSIONS, (room[0], found, rank))
    ask(k, RELEASE_TENSOR_INFO, (room[0],))
    return rank


@kernel
def take_inputs(k, context, places, sizes):
    """The inputs' addresses and what their shapes say; returns a status."""
    slot_at, found_at = stack(8), stack(SHAPE_BYTES)
    slot, found = words_at(slot_at, 1), words_at(found_at, RANK)
    for i in range(k.inputs.shape[0]):
        ask(k, INPUT, (context, k.inputs[i, 0], slot_at))
        value = slot[0]
        rank = dimensions(k, value, found_at)
        right = rank == k.inputs[i, 2]
        if right:
            for d in range(rank):
                wanted = k.inputs[i, 3 + d]
                if wanted < 0:
                    if sizes[wanted + SIZES] < 0:
                        sizes[wanted + SIZES] = found[d]
                    wanted = sizes[wanted + SIZES]
                right = right and found[d] == wanted
        if not right:
            return ask(k, CREATE_STATUS, (INVALID_ARGUMENT, k.inputs[i, 1]))
        ask(k, TENSOR_DATA, (value, slot_at))
        places[i] = slot[0]
    if not computed(sizes[SIZES + INNER], sizes[SIZES + WIDTH], sizes[SIZES + GROUPS]):
        return ask(k, CREATE_STATUS, (INVALID_ARGUMENT, k.inputs[0, 1]))
    return np.int64(0)


@kernel
def computed(inner, width, groups):
    """Whether the kernels compute rows of this length, heads of this width for so many groups; -1 for what an operator has not."""
    if inner % 16 and inner != -1:
        return False
    if width == -1:
        return True
    return width > 0 and width % 16 == 0 and width <= MOST_WIDTH and groups > 0 and inner % (groups * width) == 0


@kernel
def make_outputs(k, context, places, sizes):
    """The outputs' addresses, behind the inputs'; returns a status."""
    slot_at, wanted_at = stack(8), stack(SHAPE_BYTES)
    slot, wanted = words_at(slot_at, 1), words_at(wanted_at, RANK)
    for i in range(k.outputs.shape[0]):
        rank = k.outputs[i, 0]
        for d in range(rank):
            size = k.outputs[i, 1 + d]
            wanted[d] = size if size >= 0 else sizes[size + SIZES]
        status = ask(k, OUTPUT, (context, i, wanted_at, rank, slot_at))
        if status:
            return status
        ask(k, TENSOR_DATA, (slot[0], slot_at))
        places[k.inputs.shape[0] + i] = slot[0]
    return np.int64(0)


@kernel
def rows_of(k, wire, rows, texts):
    """How many rows an array of the Job has."""
    kind = k.wires[wire, 3]
    if kind == ROWS:
        return rows
    if kind == SIXTEENS:
        return -(-rows // 16) * 16
    return k.threads if kind == THREADS else texts


@kernel
def width_of(k, wire, sizes):
    """How long they are."""
    width = k.wires[wire, 4]
    if width == SCORES:
        return 16 * (-(-sizes[SIZES + POSITIONS] // 16) * 16 + 16)
    return width if width >= 0 else sizes[SIZES + width]


@kernel
def scratch_bytes(k, rows, texts, sizes):
    total = 0
    for w in range(k.wires.shape[0]):
        if k.wires[w, 1] == FROM_SCRATCH:
            total += -(-rows_of(k, w, rows, texts) * width_of(k, w, sizes) * k.wires[w, 5] // 64) * 64
    return total


@kernel
def borrow(k, size):
    """That many bytes, 64 behind the address, on a cache line; 0 if there are none. What the last call had, if it is enough:
    the system would take memory back and hand it out empty, a page at a time.
    """
    memory = swap(k.calls[SPARE], 0)
    if memory:
        if words_at(memory, 2)[0] >= size:
            return memory
        call(k.calls[FREE], (words_at(memory, 2)[1],))
    start = call(k.calls[MALLOC], (size + 128,))
    if not start:
        return np.int64(0)
    memory = -(-start // 64) * 64
    head = words_at(memory, 2)
    head[0], head[1] = size, start
    return memory


@kernel
def give_back(k, memory):
    """Keep it for the next call."""
    if memory:
        other = swap(k.calls[SPARE], memory)
        if other:  # of a call at the same time
            call(k.calls[FREE], (words_at(other, 2)[1],))


@kernel
def connect(k, job, places, room, first, rows, texts, sizes):
    """The arrays of a Job for rows `first` to first + rows."""
    for w in range(k.wires.shape[0]):
        word, source, width, size = k.wires[w, 0], k.wires[w, 1], width_of(k, w, sizes), k.wires[w, 5]
        count = rows_of(k, w, rows, texts)
        if source == FROM_SCRATCH:
            job[word] = room
            room += -(-count * width * size // 64) * 64
        else:
            start = places[k.wires[w, 2] + (k.inputs.shape[0] if source == FROM_OUTPUT else 0)]
            job[word] = start + first * width * size
        job[word + 1] = count
        if word != BAD:
            job[word + 2] = width


def _task(board_at, part):
    """What a thread of onnxruntime's does for a call."""
    work(board_at)
    return np.int64(0)


@kernel
def next_rows(k, first, most, rows, length, places, now):
    """How many rows from `first` on go together, and the states that they read and write, to `now`: of one text, if not all fit."""
    for i in range(MOST_TENSORS):
        now[i] = places[i]
    count = min(most, rows - first)
    if k.carried.shape[0] and most < rows:
        text, within = first // length, first % length
        count = min(count, length - within)
        for i in range(k.carried.shape[0]):
            source, target, before = k.carried[i, 0], k.carried[i, 1], text * k.carried[i, 2]
            now[target] = places[target] + before
            now[source] = now[target] if within else places[source] + before
    return count


def _compute(kernel_at, context):
    """KernelComputeV2."""
    k = read(kernel_at, _KERNEL)
    places_at, now_at, sizes_at, job_at = stack(PLACES_BYTES), stack(PLACES_BYTES), stack(SIZES_BYTES), stack(JOB_BYTES)
    places, now, sizes = words_at(places_at, MOST_TENSORS), words_at(now_at, MOST_TENSORS), words_at(sizes_at, SIZES)
    job = words_at(job_at, JOB_WORDS)
    for i in range(SIZES):
        sizes[i] = -1
    status = take_inputs(k, context, places, sizes)
    if status:
        return status
    length, texts = sizes[SIZES + TIME], sizes[SIZES + BATCH]
    status = make_outputs(k, context, places, sizes)
    if status:
        return status
    for i in range(k.job.shape[0]):
        job[i] = k.job[i]
    rows = texts * length
    past_at = stack(8)
    words_at(past_at, 1)[0] = sizes[SIZES + POSITIONS] - length
    job[_STATES], job[_PAST], job[_POSITIONS] = now_at, past_at, sizes_at
    most = min(rows, k.chunk) if k.chunk else rows
    whole = not k.chunk or (k.carried.shape[0] > 0 and most == rows)
    memory = borrow(k, scratch_bytes(k, most, texts, sizes))
    room, first = memory + 64, 0
    while memory and (first < rows or (first == 0 and whole)):
        count = next_rows(k, first, most, rows, length, places, now)
        job[_ROWS] = job[_WANTED] = count
        job[_SEQUENCES], job[_LENGTH] = (texts, length) if whole else (1, count)
        connect(k, job, places, room, first, count, texts, sizes)
        status = run_steps(k, context, job_at, count)
        if status:
            break
        first += max(count, 1)
    give_back(k, memory)
    return status


def _destroy(kernel_at, unused):
    """KernelDestroy: Python may forget the kernel."""
    k = read(kernel_at, _KERNEL)
    if call(k.calls[IS_ALIVE], (0,)) & 0xFFFFFFFF:
        state = call(k.calls[ENSURE], (0,))
        call(k.calls[FORGET], (k.owner,))
        call(k.calls[RELEASE], (state,))
    return np.int64(0)


def _entry(function: Any, digest: int) -> int:
    """The address of a function of two words, compiled or read from the disk."""
    signature = (types.int64, types.int64)
    about = (function.__qualname__, repr(_KERNEL), repr(JOB), str(digest))
    options = OPTIONS | {"no_cfunc_wrapper": False}
    dispatcher = cached(about=about, **options)(function)
    dispatcher.compile(signature)
    result = dispatcher.overloads[signature]
    _kept.append(dispatcher)
    return result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)


_kept: list[Any] = []  # compiled code that onnxruntime may call until the process ends


class Entries(NamedTuple):
    """Addresses of compiled code."""

    compute: int
    destroy: int
    task: int


@cache
def entries() -> Entries:
    """Compiled when they are first asked for."""
    return Entries(*(_entry(function, source_digest()) for function in (_compute, _destroy, _task)))
