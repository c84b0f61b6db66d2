"""The operators of the custom form as onnxruntime's own: compiled kernels that it calls itself, without Python and without copies.

Python works while a session is made: it lays a node's weights out for the kernels and writes down what the node needs (`compute.Kernel`).
A run calls compiled code alone, on the session's threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from runtime_ref.kernels.attend import MOST_WIDTH
from runtime_ref.kernels.layers import Arena
from runtime_ref.kernels.program import Program
from runtime_ref.kernels.records import words
from runtime_ref.ort import shim
from runtime_ref.ort.compute import (
    BATCH,
    GROUPS,
    INNER,
    POSITIONS,
    RANK,
    TIME,
    WIDTH,
    Kernel,
    empty_job,
    entries,
)
from runtime_ref.ort.custom_ops import keep_failure
from runtime_ref.ort.interface import ADD_DOMAIN, ADD_TO_DOMAIN, CREATE_DOMAIN, FLOAT, Api, Node, OrtCustomOp, custom_op
from runtime_ref.ort.parts import MOST_STEPS
from runtime_ref.ort.plans import OPERATORS, Plan, arena
from tmexport.errors import UsageError
from tmexport.onnx.names import DOMAIN


class _Made:
    """A kernel, and all that its words refer to; onnxruntime owns a reference."""

    def __init__(self, plan: Plan, interface: int, threads: int) -> None:
        assert len(plan.steps) <= MOST_STEPS  # what a call's threads share has room for
        job, program = empty_job(), Program(plan.steps)
        messages = [_message(number, dims) for number, dims in plan.inputs]
        inputs = [[n, ctypes.addressof(m), *_padded(dims)] for (n, dims), m in zip(plan.inputs, messages, strict=True)]
        kernel = Kernel(
            interface, id(self), threads, plan.chunk, _calls(), _table(inputs), _table([_padded(dims) for dims in plan.outputs]),
            np.array(list(words(job)), np.uint64).view(np.int64), _table([wire.words() for wire in plan.wires]),
            program.table(False, job), program.table(True, job), np.array(plan.by_rows, np.int64),
            _table(plan.carried).reshape(-1, 3),
        )  # fmt: skip
        self._kept = (job, program, messages, kernel, plan)
        self._words = np.array(list(words(kernel)), np.uint64)
        self.address: int = self._words.ctypes.data


def _padded(dims: tuple[int, ...]) -> list[int]:
    return [len(dims), *dims, *[0] * (RANK - len(dims))]


def _table(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(rows, np.int64)


def _message(number: int, dims: tuple[int, ...]) -> Any:
    names = {
        BATCH: "batch",
        TIME: "time",
        POSITIONS: "positions",
        GROUPS: "groups",
        WIDTH: "width",
        INNER: "heads x width",
    }
    told = ", ".join(names.get(d, str(d)) for d in dims)
    limits = f"; the kernels need multiples of 16, and heads of at most {MOST_WIDTH}" if INNER in dims else ""
    return ctypes.create_string_buffer(f"input {number} has another shape than [{told}]{limits}".encode())


@cache
def _calls() -> np.ndarray:
    """`compute.Kernel.calls`."""
    c, python = ctypes.CDLL(None), ctypes.pythonapi
    functions = (python.Py_IsInitialized, python.PyGILState_Ensure, python.PyGILState_Release, python.Py_DecRef)
    found = [_place(c.malloc), _place(c.free), _spare.ctypes.data, entries().task, *map(_place, functions)]
    return np.array(found, np.uint64).view(np.int64)


def _place(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


_threads = [1]
_spare = np.zeros(1, np.int64)  # memory that calls of all kernels use in turn (`compute.borrow`)


def _operator(name: str, threads: int) -> OrtCustomOp:
    inputs, outputs, plan_of = OPERATORS[name]

    def create(interface: int, info: int) -> int:
        node = Node(Api(interface), info)
        profile = node.text("profile")
        if profile != "exact":
            raise UsageError(f"the file asks for the profile {profile!r}; these kernels compute 'exact'")
        made = _Made(plan_of(node), interface, threads)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        return made.address

    code = entries()
    return custom_op(name, inputs, (FLOAT,) * outputs, create, code.compute, code.destroy, keep_failure)


@cache
def _domain(threads: int) -> tuple[OrtCustomOp, ...]:
    """The operators, for kernels of so many threads."""
    made = tuple(_operator(name, threads) for name in OPERATORS)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object((made, _calls(), _spare)))  # sessions may end after this module
    return made


def _register(options: int, base: int) -> int:
    """RegisterCustomOps."""
    try:
        api = Api.of(base)
        name = ctypes.create_string_buffer(DOMAIN.encode())
        domain = api.get(CREATE_DOMAIN, ctypes.addressof(name))
        for op in _domain(_threads[0]):
            api.call(ADD_TO_DOMAIN, domain, ctypes.addressof(op))
        api.call(ADD_DOMAIN, options, domain)
    except BaseException as error:  # nothing can pass through onnxruntime
        return Api.of(base, 1).status(str(error) or type(error).__name__)
    return 0


_REGISTER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(_register)


def register(session_options: Any, threads: int) -> None:
    """Make sessions with these options run the operators by the compiled kernels, in so many parts.

    Raises:
        UsageError: onnxruntime is too old.
        OSError: the system does not let a library be made in memory.
    """
    _threads[0], arena[0] = threads, Arena()
    session_options.register_custom_ops_library(shim.library_of(_place(_REGISTER)))
