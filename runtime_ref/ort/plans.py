"""What the kernel of each operator of the custom form does: its shapes, where its arrays come from, and the engine's phases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels.convolution import Convolution
from runtime_ref.kernels.isa import select
from runtime_ref.kernels.kinds import UNQUANTISED
from runtime_ref.kernels.layers import Arena
from runtime_ref.kernels.mamba2 import GateNorm, Scan, gate_norm_rows
from runtime_ref.kernels.packed import ROWS as TILE
from runtime_ref.kernels.packed import Packed
from runtime_ref.kernels.phases import LOGITS, PROJ, RESIDUAL, Norm, Product, Rows, norm_rows, quantize_rows, ways
from runtime_ref.kernels.program import Step
from runtime_ref.kernels.scratch import CHUNK
from runtime_ref.ort import fused, layouts
from runtime_ref.ort.compute import (
    BATCH,
    FROM_INPUT,
    FROM_OUTPUT,
    FROM_SCRATCH,
    GROUPS,
    INNER,
    POSITIONS,
    ROWS,
    SCORES,
    SIXTEENS,
    TEXTS,
    THREADS,
    TIME,
    WIDTH,
    word_of,
)
from runtime_ref.ort.interface import FLOAT, INT8, UINT8, Node
from runtime_ref.ort.mapped import release
from runtime_ref.ort.packing import pack_dense, pack_q4, pack_q8, pack_ternary, sixteens
from tmexport.errors import UsageError

_EXACT = PRESETS["exact"]
PIECE = 4096  # rows that are laid out at a time, a multiple of a tile's
arena = [Arena()]  # where weights go, one for each `register`


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
    few, many = ways(select(), _EXACT.activations)
    wires = [Wire("wide", FROM_INPUT, 0, ROWS, k), Wire("logits", FROM_OUTPUT, 0, ROWS, n)]
    steps = [Step(few, Product(packed, k, block, LOGITS), many)]
    if block:
        wires += _quantised(k)
        steps.insert(0, Step(quantize_rows(_EXACT.activations), Rows(k, block)))
    return Plan([(0, _rows(k))], [_rows(n)], wires, steps, [1, 0] if block else [0])


def _quantised(k: int) -> list[Wire]:
    """Room for rows of up to k quantised activations."""
    width = -(-k // 64) * 64 + 64
    planes = [_scratch("q", ROWS, width, 2), *(_scratch(name, SIXTEENS, width, 1) for name in ("high", "low"))]
    return planes + [_scratch(name, ROWS, -(-width // 32)) for name in ("q_scale", "q_sum")]


def _packed(pack: Callable[[np.ndarray, np.ndarray], Packed], codes: np.ndarray, scales: np.ndarray) -> Packed:
    """A matrix in the kernels' layout, made of some rows at a time: what is read is released, and copies stay small."""
    arrays, kind = [], None
    for at in range(0, len(codes), PIECE):
        part = pack(codes[at : at + PIECE], scales[at : at + PIECE])
        release(codes[at : at + PIECE])
        if kind is None:
            tiles, kind = -(-len(codes) // TILE), type(part)
            arrays = [arena[0].room((tiles, *array.shape[1:]), array.dtype) for array in part]
        for whole, array in zip(arrays, part, strict=True):
            whole[at // TILE : at // TILE + len(array)] = array
    if kind is None:
        raise UsageError("a weight has no rows")
    return kind(*arrays)


def _coded(pack: Callable[[np.ndarray, np.ndarray], Packed], kind: int, per_byte: int) -> Callable[[Node], Plan]:
    """A product with codes, so many a byte, and scales; pack: into the kernels' layout."""

    def plan(node: Node) -> Plan:
        block = node.number("group_size") if per_byte == 4 else 32
        return _product(*_weight(node, 1, pack, kind, per_byte, block), block)

    return plan


def _weight(
    node: Node, first: int, pack: Callable[[np.ndarray, np.ndarray], Packed], kind: int, per_byte: int, block: int
) -> tuple[Packed, int, int]:
    """The matrix whose codes are the input `first`, its scales the next; its rows, and their length."""
    codes, scales = node.constant(first, "codes", kind, 2), node.constant(first + 1, "scales", FLOAT, 2)
    k = codes.shape[1] * per_byte
    if scales.shape[1] * block != k:
        raise UsageError(f"a weight has rows of {k} and {scales.shape[1]} scales; expected one for every {block}")
    return _packed(pack, codes, scales), len(codes), k


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


def _scan(node: Node, norm: np.ndarray | None, eps: float, first: int = 3) -> Plan:
    """A mixer between its projections; the inputs stand in `tmexport.onnx.functions`. first: number of the convolution's weight."""
    heads, n, width = node.shape(2)[1:]
    weight = node.constant(first, "the convolution's weight", FLOAT, 3)[:, 0]
    vectors = [node.constant(first + i, "a vector of a scan", FLOAT, 1).copy() for i in (1, 2, 3, 4)]
    bias, dt_bias, a, d = vectors
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


def _mixer_block(node: Node) -> Plan:
    """A whole block; the inputs stand in `fused`. Rows go CHUNK at a time, so that what lies between the phases stays in the cache."""
    norm, gate = (node.constant(i, "a norm's weight", FLOAT, 1).copy() for i in (12, 14))
    d = sixteens("the rows to normalise", len(norm))
    scan = _scan(node, gate, float(node.constant(15, "epsilon")), first=5)
    (_, (_, _, projected)), conv, ssm = scan.inputs[0], scan.outputs[1], scan.outputs[2]
    blocks = [node.number(name) for name in ("group_size", "out_group_size")]
    into, out = (_weight(node, at, pack_ternary, UINT8, 4, b) for at, b in zip((3, 10), blocks, strict=True))
    if into[1:] != (projected, d) or out[1:] != (d, len(gate)):
        raise UsageError(f"projections of {into[1:]} and {out[1:]} do not fit rows of {d} and a mixer of {len(gate)}")
    few, many = ways(select(), _EXACT.activations)
    convolving, scanning, gating = scan.steps
    steps = [
        Step(layouts.norm_texts(_EXACT.activations), Norm(norm, float(node.constant(13, "epsilon")), blocks[0], 0)),
        Step(few, Product(into[0], d, blocks[0], PROJ), many),
        convolving,
        scanning,
        Step(gating.body, gating.args._replace(block=blocks[1])),
        Step(few, Product(out[0], len(gate), blocks[1], RESIDUAL), many),
    ]
    longest = max(d, len(gate))
    wires = [
        Wire("dt", FROM_INPUT, 0, ROWS, d),
        Wire("x", FROM_OUTPUT, 0, ROWS, d),
        _scratch("wide", ROWS, longest),
        _scratch("proj", ROWS, -(-projected // 16) * 16),
        *scan.wires[2:],
        *_quantised(longest),
    ]
    carried = [(i, 3 + i, 4 * state[1] * math.prod(state[2:])) for i, state in ((1, conv), (2, ssm))]
    inputs = [(0, _rows(d)), (1, conv), (2, ssm)]
    return Plan(inputs, [_rows(d), conv, ssm], wires, steps, [1, 0, 0, 0, 1, 0], carried=carried)


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
    fused.OPERATOR: (((FLOAT,) * 3 + (UINT8,) + (FLOAT,) * 6 + (UINT8,) + (FLOAT,) * 5), 3, _mixer_block),
}
