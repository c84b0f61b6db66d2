"""The Mamba-2 mixer between its projections: the convolution, and the scan with its gate (`reference.mamba2`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.arithmetic import Activations, RecurrentState
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, made_for, stack
from runtime_ref.kernels.convolution import Convolution, convolve_rows
from runtime_ref.kernels.isa import PRIMITIVES, Isa
from runtime_ref.kernels.layers import Layer, sixteens
from runtime_ref.kernels.math import exp, softplus, vector_silu
from runtime_ref.kernels.matmul import quantize_row
from runtime_ref.kernels.norm import rms_norm
from runtime_ref.kernels.phases import PROJ, Rows, quantize_rows
from runtime_ref.kernels.program import Span, Step
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.scratch import Room
from runtime_ref.kernels.states import STORED
from runtime_ref.kernels.tiles import F32, Code
from runtime_ref.kernels.vector import (
    LANES,
    address,
    ask_for_line,
    load,
    splat,
    splatted,
    store,
    tree_sums,
)
from tmexport.model.branches.mamba2 import Mamba2

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

TOKENS = 8  # whose channels' state stays in registers
AHEAD = 8192  # bytes of state to ask for in advance, when every byte is read for one token
_VECTOR = 4 * LANES
SUMS = TOKENS * 16 * _VECTOR  # bytes: the sums of 16 channels for that many tokens
STEPS = 4 * TOKENS  # bytes: a number for each of them


@intrinsic
def _scan_pair(typingctx, isa, kept_as, h, n, xbc, stride, x_at, b_at, c_at, decay, dt, tokens, sums):
    """Two neighbouring channels of a head over `tokens` consecutive tokens, from an address each.

    h: the first channel's state, n elements, the second's behind it; read once, updated in registers, written once. xbc: the
    first token's row, `stride` bytes a row, in which x_at, b_at and c_at are the bytes before the first channel's x, and
    before B and C. decay, dt: fp32 [tokens]. sums: fp32 [tokens][16 channels][16 lanes], of which the two channels' are set.
    The state is rounded to its format after every token; the sums read it before.
    """
    stored = STORED[kept_as.instance_class]
    widths = PRIMITIVES[isa.instance_class].scan
    sig = types.void(isa, kept_as, *[types.int64] * 11)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        h_at, n, row_bytes, count = code.pointer(args[2]), args[3], args[5], args[11]
        rows, decay_at, dt_at, sums_at = (code.pointer(args[i]) for i in (4, 9, 10, 12))
        wide, kept = ir.VectorType(F32, LANES), ir.VectorType(stored, LANES)
        size = 4 if stored is F32 else 2
        channels = (h_at, code.at(h_at, b.mul(n, code.i64(size))))
        once = b.icmp_signed("==", count, code.i64(1))

        def part(start, width):
            """`width` vectors of both channels, from element `start`."""
            places = [
                [code.at(channel, b.mul(b.add(start, code.i64(LANES * i)), code.i64(size))) for i in range(width)]
                for channel in channels
            ]
            with b.if_then(once):
                for place in [place for channel in places for place in channel][:: 4 // size]:
                    ask_for_line(b, code.at(place, AHEAD), level=2)
            h = [code.load(place, kept, size) for channel in places for place in channel]
            beginning = b.icmp_signed("==", start, code.i64(0))

            def token(t, h):
                row = code.at(rows, b.mul(t, row_bytes))
                four = b.mul(t, code.i64(4))
                fade = splatted(b, code.load(code.at(decay_at, four), F32, 4), LANES)
                step = code.load(code.at(dt_at, four), F32, 4)
                x = code.at(row, args[6])
                inputs = [splatted(b, b.fmul(step, code.load(code.at(x, 4 * i), F32, 4)), LANES) for i in range(2)]
                target = code.at(sums_at, b.mul(t, code.i64(16 * _VECTOR)))
                lanes = [
                    b.select(beginning, ir.Constant(wide, None), code.load(code.at(target, _VECTOR * i), wide, 4))
                    for i in range(2)
                ]
                following = list(h)
                for i in range(width):
                    offset = b.mul(b.add(start, code.i64(LANES * i)), code.i64(4))
                    b_part, c_part = (code.load(code.at(code.at(row, args[k]), offset), wide, 4) for k in (7, 8))
                    for channel in range(2):
                        old = h[channel * width + i]
                        old = old if stored is F32 else b.fpext(old, wide)
                        new = b.fadd(b.fmul(old, fade), b.fmul(inputs[channel], b_part))
                        lanes[channel] = b.fadd(lanes[channel], b.fmul(new, c_part))
                        following[channel * width + i] = new if stored is F32 else b.fptrunc(new, kept)
                for i in range(2):
                    code.store(lanes[i], code.at(target, _VECTOR * i))
                return following

            h = code.loop(count, h, token)
            for value, place in zip(h, [place for channel in places for place in channel], strict=True):
                code.store(value, place, size)

        start = code.i64(0)
        for width in widths:
            elements = code.i64(LANES * width)
            parts = b.sdiv(b.sub(n, start), elements)
            with b.if_then(b.icmp_signed(">", parts, code.i64(0))):
                begin = start

                def run(i, _, begin=begin, width=width, elements=elements):
                    part(b.add(begin, b.mul(i, elements)), width)
                    return []

                code.loop(parts, [], run)
            start = b.add(start, b.mul(parts, elements))
        return context.get_dummy_value()

    return sig, codegen


@inlined
def scan_head(isa, kept_as, a, s, states, first, rows, head):
    """The recurrence of one head over `rows` consecutive tokens, and the gate.

    a: a Scan; states: the address of the head's state [P, N], which is updated.
    """
    n, width, base = a.d_state, a.headdim, head * a.headdim
    group = head // (a.n_heads // a.n_groups)
    d_inner = a.n_heads * a.headdim
    b_at = 4 * (d_inner + group * n)
    c_at = b_at + 4 * a.n_groups * n
    dt_at, bias, rate = 2 * d_inner + 2 * a.n_groups * n + head, a.dt_bias[head], a.a[head]
    skip, stride, channel_bytes = splat(a.d[head]), s.xbc.strides[0], n * kept_as.width
    sums_at, dt_row, decay_row = stack(SUMS), stack(STEPS), stack(STEPS)
    dt, decay = floats_at(dt_row, TOKENS), floats_at(decay_row, TOKENS)
    for start in range(0, rows, TOKENS):
        r, count = first + start, min(TOKENS, rows - start)
        for t in range(count):
            dt[t] = softplus(s.proj[r + t, dt_at] + bias)
            decay[t] = exp(dt[t] * rate)
        xbc = address(s.xbc[r])
        for p in range(0, width, 16):
            for channel in range(p, p + 16, 2):
                _scan_pair(
                    isa, kept_as, states + channel * channel_bytes, n, xbc, stride, 4 * (base + channel), b_at, c_at,
                    decay_row, dt_row, count, sums_at + (channel - p) * _VECTOR,
                )  # fmt: skip
            for t in range(count):
                at = base + p
                y = tree_sums(floats_at(sums_at + 16 * _VECTOR * t, 256)) + skip * load(s.xbc[r + t], at)
                store(s.wide[r + t], at, y * vector_silu(load(s.proj[r + t], at)))


class Scan(NamedTuple):
    """Dimensions (tmexport.model.branches.mamba2); dt_bias, a (= -exp(A_log)), d: fp32 [H]; slot, index: of the state."""

    n_heads: int
    headdim: int
    d_state: int
    n_groups: int
    dt_bias: np.ndarray
    a: np.ndarray
    d: np.ndarray
    slot: int
    index: int


class GateNorm(NamedTuple):
    """weight fp32 [d_inner], normed in `groups` parts; eps; block: as in `phases.Norm`."""

    weight: np.ndarray
    groups: int
    eps: float
    block: int


@made_for
def scan_rows(isa: Isa, kept_as: RecurrentState) -> Any:
    """Every head of every text."""

    @inlined
    def body(tid, threads, job, a):
        low, high = share(a.n_heads, tid, threads)
        head_bytes = a.headdim * a.d_state * kept_as.width
        for q in range(job.sequences):
            states = np.int64(job.states[a.slot, q]) + a.index * a.n_heads * head_bytes
            for head in range(low, high):
                scan_head(isa, kept_as, a, job.s, states + head * head_bytes, q * job.length, job.length, head)

    return body


@made_for
def gate_norm_rows(activations: Activations) -> Any:
    """The norm of what the scan left in s.wide, part by part."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s, d_inner = job.s, a.weight.shape[0]
        part = d_inner // a.groups
        for r in range(tid, job.rows, threads):
            for g in range(a.groups):
                span = s.wide[r, g * part : (g + 1) * part]
                rms_norm(span, a.weight[g * part : (g + 1) * part], span, a.eps)
            if a.block:
                quantize_row(levels, s, r, d_inner, a.block)

    return body


def check(branch: Mamba2) -> None:
    """Raises GGUFError for dimensions that the kernels do not compute."""
    sixteens("headdim", branch.headdim)
    sixteens("d_state", branch.d_state)


def room(branch: Mamba2) -> Room:
    """What its phases need of a Scratch."""
    return Room(wide=branch.d_inner, proj=branch.d_in_proj, xbc=branch.conv_dim)


# in the order that identifies a model's weights in saved states
SMALL = ("gate_norm", "conv_weight", "conv_bias", "dt_bias", "a", "d")


def steps(layer: Layer) -> list[Step]:
    """The mixer of one layer, from its norm to its sum.

    Raises:
        GGUFError: damaged tensors, or types that the kernels do not compute.
    """
    c, small = layer.branch, layer.small
    out = layer.matrix("out_proj")
    scan = Scan(
        c.n_heads,
        c.headdim,
        c.d_state,
        c.n_groups,
        small["dt_bias"],
        small["a"],
        small["d"],
        layer.slot + 1,
        layer.index,
    )
    activations = layer.preset.activations
    if c.gate_norm:
        gated = Step(gate_norm_rows(activations), GateNorm(small["gate_norm"], c.n_groups, layer.eps, out.block))
    else:
        gated = Step(quantize_rows(activations), Rows(c.d_inner, out.block))
    convolution = Convolution(small["conv_weight"], small["conv_bias"], c.d_inner, layer.slot, layer.index)
    xbc, dt = Span(PROJ, c.d_inner, c.conv_dim), Span(PROJ, c.d_inner + c.conv_dim, c.n_heads)
    return [
        *layer.normed_product("in_proj", PROJ),
        Step(convolve_rows, convolution, updates=layer.slots[:1], inputs=[xbc]),
        Step(scan_rows(layer.isa, layer.preset.state), scan, updates=layer.slots[1:], inputs=[dt]),
        gated,
        *layer.output(out),
    ]
