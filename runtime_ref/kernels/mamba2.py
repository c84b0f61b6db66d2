"""The Mamba-2 mixer between its projections: the convolution, and the scan with its gate (`reference.mamba2`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.arithmetic import REFRESH, Activations, RecurrentState
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, kernel, made_for, stack
from runtime_ref.kernels.convolution import Convolution, convolve_rows
from runtime_ref.kernels.hadamard import Hadamard, hadamard_rows
from runtime_ref.kernels.isa import PRIMITIVES, Isa
from runtime_ref.kernels.layers import Layer, sixteens
from runtime_ref.kernels.math import exp, softplus, vector_silu
from runtime_ref.kernels.matmul import quantize_row
from runtime_ref.kernels.norm import rms_norm
from runtime_ref.kernels.phases import PROJ, Rows, quantize_rows
from runtime_ref.kernels.program import Span, Step
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.scratch import Room
from runtime_ref.kernels.states import (
    AREA,
    FORMATS,
    INVERSE,
    OLD,
    UNIT,
    advance_rows,
    begin_rows,
    end_rows,
    faded,
    in_unit,
    scales_after,
    top_of,
)
from runtime_ref.kernels.tiles import F32, Code
from runtime_ref.kernels.vector import (
    LANES,
    address,
    ask_for_line,
    load,
    peek,
    poke,
    splat,
    splatted,
    store,
    tree_sums,
)
from tmexport.model.branches.mamba2 import Mamba2

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

TOKENS = REFRESH  # whose channels' state stays in registers
AHEAD = 8192  # bytes of state to ask for in advance, when every byte is read for one token
_VECTOR = 4 * LANES
SUMS = TOKENS * 16 * _VECTOR  # bytes: the sums of 16 channels for that many tokens
STEPS = 3 * 4 * TOKENS  # bytes: three numbers for each of them
VECTORS = _VECTOR * TOKENS


@intrinsic
def _scan_pair(typingctx, isa, kept_as, h, n, xbc, stride, b_at, c_at, fades, steps, tokens, sums):
    """Two neighbouring channels of a head over `tokens` consecutive tokens, from an address each.

    h: the first channel's state, n elements, the second's behind it; read once, updated in registers, written once. xbc: the
    first token's row, `stride` bytes a row, in which b_at and c_at are the bytes before B and C. fades, steps: fp32 [tokens][16
    channels], from the two channels'. sums: fp32 [tokens][16 channels][16 lanes], of which the two channels' are set.
    The state is rounded to its format after every token; the sums read it before.
    """
    form = FORMATS[kept_as.instance_class]
    widths = PRIMITIVES[isa.instance_class].scan
    sig = types.void(isa, kept_as, *[types.int64] * 10)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        h_at, n, row_bytes, count = code.pointer(args[2]), args[3], args[5], args[10]
        rows, fades_at, steps_at, sums_at = (code.pointer(args[i]) for i in (4, 8, 9, 11))
        wide = ir.VectorType(F32, LANES)
        channels = (h_at, code.at(h_at, b.mul(n, code.i64(form.width))))
        once = b.icmp_signed("==", count, code.i64(1))

        def part(start, width):
            """`width` vectors of both channels, from element `start`."""
            places = [
                code.at(channel, b.mul(b.add(start, code.i64(LANES * i)), code.i64(form.width)))
                for channel in channels
                for i in range(width)
            ]
            with b.if_then(once):
                for place in places[:: 4 // form.width]:
                    ask_for_line(b, code.at(place, AHEAD), level=2)
            h = [form.load(code, place) for place in places]
            beginning = b.icmp_signed("==", start, code.i64(0))

            def token(t, h):
                row, vector = code.at(rows, b.mul(t, row_bytes)), b.mul(t, code.i64(_VECTOR))
                fade, step = (
                    [splatted(b, code.load(code.at(code.at(at, vector), 4 * i), F32, 4), LANES) for i in range(2)]
                    for at in (fades_at, steps_at)
                )
                target = code.at(sums_at, b.mul(t, code.i64(16 * _VECTOR)))
                lanes = [
                    b.select(beginning, ir.Constant(wide, None), code.load(code.at(target, _VECTOR * i), wide, 4))
                    for i in range(2)
                ]
                following = list(h)
                for i in range(width):
                    offset = b.mul(b.add(start, code.i64(LANES * i)), code.i64(4))
                    b_part, c_part = (code.load(code.at(code.at(row, args[k]), offset), wide, 4) for k in (6, 7))
                    for channel in range(2):
                        old = form.opened(b, h[channel * width + i])
                        new = b.fadd(b.fmul(old, fade[channel]), b.fmul(step[channel], b_part))
                        lanes[channel] = b.fadd(lanes[channel], b.fmul(new, c_part))
                        following[channel * width + i] = form.rounded(b, new)
                for i in range(2):
                    code.store(lanes[i], code.at(target, _VECTOR * i))
                return following

            h = code.loop(count, h, token)
            for value, place in zip(h, places, strict=True):
                form.store(code, value, place)

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


@kernel
def scan_head(isa, kept_as, a, s, states, scales, past, first, rows, head):
    """The recurrence of one head over `rows` consecutive tokens, the first at position `past` of its text, and the gate.

    a: a Scan; states: the address of the head's state [P, N], which is updated; scales: of its rows' scales, if it has them.
    """
    n, width, base = a.d_state, a.headdim, head * a.headdim
    group = head // (a.n_heads // a.n_groups)
    d_inner = a.n_heads * a.headdim
    b_first = d_inner + group * n
    b_at = 4 * b_first
    c_at = b_at + 4 * a.n_groups * n
    dt_at, bias, rate = 2 * d_inner + 2 * a.n_groups * n + head, a.dt_bias[head], a.a[head]
    skip, stride, row_bytes = splat(a.d[head]), s.xbc.strides[0], n * kept_as.width
    sums_at, area, fades, steps, units = stack(SUMS), stack(AREA), stack(VECTORS), stack(VECTORS), stack(VECTORS)
    of_tokens = floats_at(stack(STEPS), 3 * TOKENS)
    dt, decay, top_b = of_tokens[:TOKENS], of_tokens[TOKENS : 2 * TOKENS], of_tokens[2 * TOKENS :]
    start = 0
    while start < rows:  # in steps that end where a format may look at its rows
        r, count = first + start, min(TOKENS - (past + start) % TOKENS, rows - start)
        for t in range(count):
            dt[t] = softplus(s.proj[r + t, dt_at] + bias)
            decay[t] = exp(dt[t] * rate)
            top_b[t] = top_of(kept_as, s.xbc[r + t], b_first, n)
        xbc = address(s.xbc[r])
        for p in range(0, width, 16):
            begin_rows(kept_as, area, states + p * row_bytes, scales + 4 * p, n, past + start)
            for t in range(count):
                fade = splat(decay[t])
                step = advance_rows(kept_as, area, fade, splat(dt[t]) * load(s.xbc[r + t], base + p), top_b[t])
                poke(steps + _VECTOR * t, step)
                poke(fades + _VECTOR * t, faded(kept_as, fade, peek(area + OLD), peek(area + INVERSE)))
                poke(units + _VECTOR * t, peek(area + UNIT))
            end_rows(kept_as, area, scales + 4 * p)
            for channel in range(0, 16, 2):
                _scan_pair(
                    isa, kept_as, states + (p + channel) * row_bytes, n, xbc, stride, b_at, c_at,
                    fades + 4 * channel, steps + 4 * channel, count, sums_at + channel * _VECTOR,
                )  # fmt: skip
            for t in range(count):
                at = base + p
                y = in_unit(kept_as, tree_sums(floats_at(sums_at + 16 * _VECTOR * t, 256)), peek(units + _VECTOR * t))
                y = y + skip * load(s.xbc[r + t], at)
                store(s.wide[r + t], at, y * vector_silu(load(s.proj[r + t], at)))
        start += count


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

    further = scales_after(kept_as)

    @inlined
    def body(tid, threads, job, a):
        low, high = share(a.n_heads, tid, threads)
        for q in range(job.sequences):
            for head in range(low, high):
                row = (a.index * a.n_heads + head) * a.headdim
                states = np.int64(job.states[a.slot, q]) + row * a.d_state * kept_as.width
                scales = np.int64(job.states[a.slot + further, q]) + 4 * row
                scan_head(isa, kept_as, a, job.s, states, scales, job.past[q], q * job.length, job.length, head)

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
    sixteens("online_hadamard", branch.online_hadamard)


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
    activations, size = layer.preset.activations, c.online_hadamard
    turned = [Step(hadamard_rows(activations), Hadamard(c.d_inner, size, size**-0.5, out.block))] if size else []
    ready = 0 if turned else out.block  # what quantises the row is the last step before the product
    if c.gate_norm:
        gated = [Step(gate_norm_rows(activations), GateNorm(small["gate_norm"], c.n_groups, layer.eps, ready)), *turned]
    else:
        gated = turned or [Step(quantize_rows(activations), Rows(c.d_inner, ready))]
    convolution = Convolution(small["conv_weight"], small["conv_bias"], c.d_inner, layer.slot, layer.index)
    xbc, dt = Span(PROJ, c.d_inner, c.conv_dim), Span(PROJ, c.d_inner + c.conv_dim, c.n_heads)
    return [
        *layer.normed_product("in_proj", PROJ),
        Step(convolve_rows, convolution, updates=layer.slots[:1], inputs=[xbc]),
        Step(scan_rows(layer.isa, layer.preset.state), scan, updates=layer.slots[1:], inputs=[dt]),
        *gated,
        *layer.output(out),
    ]
