"""The operators of the custom form as onnxruntime's own: compiled kernels that it calls itself, without Python and without copies.

Python works while a session is made: it lays a node's weights out for the kernels and writes down what the node needs (`compute.Kernel`).
A run calls compiled code alone, on the session's threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels.attend import MOST_WIDTH
from runtime_ref.kernels.convolution import Convolution
from runtime_ref.kernels.isa import select
from runtime_ref.kernels.kinds import UNQUANTISED
from runtime_ref.kernels.layers import Arena
from runtime_ref.kernels.mamba2 import GateNorm, Scan, gate_norm_rows
from runtime_ref.kernels.packed import ROWS as TILE
from runtime_ref.kernels.packed import Packed
from runtime_ref.kernels.phases import LOGITS, Norm, Product, Rows, norm_rows, quantize_rows, ways
from runtime_ref.kernels.program import Program, Step
from runtime_ref.kernels.records import words
from runtime_ref.kernels.scratch import CHUNK
from runtime_ref.ort import layouts, shim
from runtime_ref.ort.compute import (
    BATCH,
    FROM_INPUT,
    FROM_OUTPUT,
    FROM_SCRATCH,
    GROUPS,
    INNER,
    POSITIONS,
    RANK,
    ROWS,
    SCORES,
    SIXTEENS,
    TEXTS,
    THREADS,
    TIME,
    WIDTH,
    Kernel,
    empty_job,
    entries,
    word_of,
)
from runtime_ref.ort.custom_ops import keep_failure
from runtime_ref.ort.interface import (
    ADD_DOMAIN,
    ADD_TO_DOMAIN,
    CREATE_DOMAIN,
    FLOAT,
    INT8,
    UINT8,
    Api,
    Node,
    OrtCustomOp,
    custom_op,
)
from runtime_ref.ort.mapped import release
from runtime_ref.ort.packing import pack_dense, pack_q4, pack_q8, pack_ternary, sixteens
from tmexport.errors import UsageError
from tmexport.onnx.names import DOMAIN

_EXACT = PRESETS["exact"]
PIECE = 4096  # rows that are laid out at a time, a multiple of a tile's


class Wire(NamedTuple):
    """Where an array of a Job comes from (`compute.Kernel.wires`)."""

    field: str
    source: int
    number: int
    rows: int
    width: int
    size: int = 4

    def words(self) -> list[int]:
        return [word_of(self.field), *self[1:]]


class Plan(NamedTuple):
    """What a node's kernel does.

    inputs: number, dimensions; outputs: dimensions; wires; steps, of which the names in `by_rows` have one thread for a row; chunk: rows at a time.
    carried: states of a text, `compute.Kernel`.
    """

    inputs: Sequence[tuple[int, tuple[int, ...]]]
    outputs: Sequence[tuple[int, ...]]
    wires: Sequence[Wire]
    steps: Sequence[Step]
    by_rows: Sequence[int]
    chunk: int = CHUNK
    carried: Sequence[tuple[int, int, int]] = ()


def _scratch(field: str, rows: int, width: int, size: int = 4) -> Wire:
    return Wire(field, FROM_SCRATCH, 0, rows, width, size)


def _rows(width: int) -> tuple[int, ...]:
    return (BATCH, TIME, width)


def _product(packed: Packed, n: int, k: int, block: int) -> Plan:
    """x [B, T, k] times a matrix [n, k]."""
    block = 0 if isinstance(packed, UNQUANTISED) else block
    width = -(-k // 64) * 64 + 64
    few, many = ways(select(), _EXACT.activations)
    wires = [Wire("wide", FROM_INPUT, 0, ROWS, k), Wire("logits", FROM_OUTPUT, 0, ROWS, n)]
    steps = [Step(few, Product(packed, k, block, LOGITS), many)]
    if block:
        wires += [
            _scratch("q", ROWS, width, 2),
            _scratch("high", SIXTEENS, width, 1),
            _scratch("low", SIXTEENS, width, 1),
        ]
        wires += [_scratch(name, ROWS, -(-width // 32)) for name in ("q_scale", "q_sum")]
        steps.insert(0, Step(quantize_rows(_EXACT.activations), Rows(k, block)))
    return Plan([(0, _rows(k))], [_rows(n)], wires, steps, [1, 0] if block else [0])


def _packed(pack: Callable[[np.ndarray, np.ndarray], Packed], codes: np.ndarray, scales: np.ndarray) -> Packed:
    """A matrix in the kernels' layout, made of some rows at a time: what is read is released, and copies stay small."""
    arrays, kind = [], None
    for at in range(0, len(codes), PIECE):
        part = pack(codes[at : at + PIECE], scales[at : at + PIECE])
        release(codes[at : at + PIECE])
        if kind is None:
            tiles, kind = -(-len(codes) // TILE), type(part)
            arrays = [_arena[0].room((tiles, *array.shape[1:]), array.dtype) for array in part]
        for whole, array in zip(arrays, part, strict=True):
            whole[at // TILE : at // TILE + len(array)] = array
    if kind is None:
        raise UsageError("a weight has no rows")
    return kind(*arrays)


def _coded(pack: Callable[[np.ndarray, np.ndarray], Packed], kind: int, per_byte: int) -> Callable[[Node], Plan]:
    """A product with codes, so many a byte, and scales; pack: into the kernels' layout."""

    def plan(node: Node) -> Plan:
        codes, scales = node.constant(1, "codes", kind, 2), node.constant(2, "scales", FLOAT, 2)
        packed = _packed(pack, codes, scales)
        k, block = codes.shape[1] * per_byte, node.number("group_size") if per_byte == 4 else 32
        if scales.shape[1] * block != k:
            raise UsageError(f"a weight has rows of {k} and {scales.shape[1]} scales; expected one for every {block}")
        return _product(packed, len(codes), k, block)

    return plan


def _dense_matmul(node: Node) -> Plan:
    weight = node.constant(1, "a weight", FLOAT, 2)
    return _product(pack_dense(weight), len(weight), weight.shape[1], 0)


def _rms_norm(node: Node) -> Plan:
    weight = node.constant(1, "a norm's weight", FLOAT, 1).copy()
    d = sixteens("the rows to normalise", len(weight))
    wires = [Wire("x", FROM_INPUT, 0, ROWS, d), Wire("wide", FROM_OUTPUT, 0, ROWS, d), _scratch("bad", ROWS, 1, 8)]
    step = Step(norm_rows(_EXACT.activations), Norm(weight, float(node.constant(2, "epsilon")), 0, 0))
    return Plan([(0, _rows(d))], [_rows(d)], wires, [step], [1])


def _swiglu(node: Node) -> Plan:
    rows = _rows(INNER)
    sources = (("proj", FROM_INPUT, 0), ("mid", FROM_INPUT, 1), ("wide", FROM_OUTPUT, 0))
    wires = [Wire(*source, ROWS, INNER) for source in sources]
    return Plan([(0, rows), (1, rows)], [rows], wires, [Step(layouts.gate_texts, layouts.Gate())], [1])


def _selective_scan(node: Node) -> Plan:
    weight = node.constant(8, "the norm's weight", FLOAT, 1).copy()
    return _scan(node, weight, float(node.constant(9, "epsilon")))


def _gated_scan(node: Node) -> Plan:
    return _scan(node, None, 0.0)


def _scan(node: Node, norm: np.ndarray | None, eps: float) -> Plan:
    """A mixer between its projections; the inputs stand in `tmexport.onnx.functions`."""
    heads, n, width = node.shape(2)[1:]
    weight = node.constant(3, "the convolution's weight", FLOAT, 3)[:, 0]
    bias, dt_bias, a, d = (node.constant(i, "a vector of a scan", FLOAT, 1).copy() for i in (4, 5, 6, 7))
    channels, taps = weight.shape
    inner, rest = heads * width, channels - heads * width
    if (
        min(heads, n, width) < 1
        or rest < 1
        or rest % (2 * n)
        or len(a) != heads
        or (norm is not None and len(norm) != inner)
    ):
        raise UsageError(f"a state of {heads} heads, {n} x {width}, does not fit {channels} channels")
    groups = rest // (2 * n)
    sixteens("the channels of a head", width)
    sixteens("a channel's states", n)
    projected, conv, ssm = inner + channels + heads, (BATCH, channels, taps - 1), (BATCH, heads, n, width)
    wires = [
        Wire("proj", FROM_INPUT, 0, ROWS, projected),
        Wire("wide", FROM_OUTPUT, 0, ROWS, inner),
        _scratch("xbc", ROWS, channels),
        _scratch("sum", TEXTS, (taps - 1) * channels),
        _scratch("mid", THREADS, width * max(n, 17)),
    ]
    steps = [
        Step(layouts.convolve_texts, Convolution(np.ascontiguousarray(weight.T), bias, inner, 0, 0)),
        Step(layouts.scan_texts(select(), _EXACT.state), Scan(heads, width, n, groups, dt_bias, a, d, 0, 0)),
    ]
    if norm is not None:
        steps.append(Step(gate_norm_rows(_EXACT.activations), GateNorm(norm, groups, eps, 0)))
    inputs = [(0, _rows(projected)), (1, conv), (2, ssm)]
    return Plan(inputs, [_rows(inner), conv, ssm], wires, steps, [0, 0, 1][: len(steps)], chunk=0)


def _causal_attention(node: Node) -> Plan:
    keys = (BATCH, GROUPS, POSITIONS, WIDTH)
    wires = [
        Wire("proj", FROM_INPUT, 0, ROWS, INNER),
        Wire("wide", FROM_OUTPUT, 0, ROWS, INNER),
        _scratch("scores", THREADS, SCORES),
    ]
    step = Step(layouts.attend_texts(_EXACT.cache), layouts.Attention(float(node.constant(3, "the scale"))))
    inputs = [(0, _rows(INNER)), (1, keys), (2, keys)]
    return Plan(inputs, [_rows(INNER)], wires, [step], [0], chunk=0)


# name: types of the inputs, number of outputs, plan
OPERATORS: dict[str, tuple[tuple[int, ...], int, Callable[[Node], Plan]]] = {
    "TernaryMatMul": ((FLOAT, UINT8, FLOAT), 1, _coded(pack_ternary, UINT8, 4)),
    "Q4MatMul": ((FLOAT, UINT8, FLOAT), 1, _coded(pack_q4, UINT8, 2)),
    "Q8MatMul": ((FLOAT, INT8, FLOAT), 1, _coded(pack_q8, INT8, 1)),
    "DenseMatMul": ((FLOAT, FLOAT), 1, _dense_matmul),
    "RMSNorm": ((FLOAT,) * 3, 1, _rms_norm),
    "SwiGLU": ((FLOAT,) * 2, 1, _swiglu),
    "SelectiveScan": ((FLOAT,) * 10, 3, _selective_scan),
    "GatedScan": ((FLOAT,) * 8, 3, _gated_scan),
    "CausalAttention": ((FLOAT,) * 4, 1, _causal_attention),
}


class _Made:
    """A kernel, and all that its words refer to; onnxruntime owns a reference."""

    def __init__(self, plan: Plan, interface: int, threads: int) -> None:
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


_arena = [Arena()]
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
    _threads[0], _arena[0] = threads, Arena()
    session_options.register_custom_ops_library(shim.library_of(_place(_REGISTER)))
