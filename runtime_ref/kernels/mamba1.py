"""The Mamba-1 mixer (`reference.mamba1`): every channel has a decay for each of its states."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import REFRESH, Activations, RecurrentState
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, kernel, made_for, stack
from runtime_ref.kernels.convolution import Convolution, convolve_rows
from runtime_ref.kernels.layers import Layer, sixteens
from runtime_ref.kernels.math import softplus, vector_exp, vector_silu
from runtime_ref.kernels.matmul import quantize_row
from runtime_ref.kernels.phases import DT, MID, PROJ, Rows, quantize_rows
from runtime_ref.kernels.program import Span, Step
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.scratch import Room
from runtime_ref.kernels.states import (
    AREA,
    INVERSE,
    OLD,
    UNIT,
    advance_rows,
    begin_rows,
    end_rows,
    faded,
    in_unit,
    load_state,
    scales_after,
    slowest_of,
    store_state,
    top_of,
)
from runtime_ref.kernels.vector import load, peek, poke, splat, store, tree_sums
from tmexport.model.branches.mamba1 import Mamba1

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ZERO = np.float32(0.0)


class Slice(NamedTuple):
    """`count` values of s.xbc or of s.mid for the next product, which quantises them in blocks (0: it does not)."""

    count: int
    block: int


class Scan(NamedTuple):
    """a (= -exp(A_log)) fp32 [d_inner, N]; slowest: its largest of each channel, or [0]; d, dt_bias [d_inner]; rank: of dt, before B and C in s.mid; slot, index: of the
    state.
    """

    a: np.ndarray
    slowest: np.ndarray
    d: np.ndarray
    dt_bias: np.ndarray
    rank: int
    slot: int
    index: int


@made_for
def convolved_rows(activations: Activations) -> Any:
    """The convolution's output as x_proj reads it."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s = job.s
        for r in range(tid, job.rows, threads):
            for i in range(0, a.count, 16):
                store(s.wide[r], i, load(s.xbc[r], i))
            if a.block:
                quantize_row(levels, s, r, a.count, a.block)

    return body


@made_for
def dt_rows(activations: Activations) -> Any:
    """The first values of x_proj's output as dt_proj reads them, with zeros up to a multiple of 16."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s = job.s
        for r in range(tid, job.rows, threads):
            for i in range((a.count + 15) // 16 * 16):
                s.wide[r, i] = s.mid[r, i] if i < a.count else ZERO
            if a.block:
                quantize_row(levels, s, r, a.count, a.block)

    return body


@made_for
def scan_rows(kept_as: RecurrentState) -> Any:
    """Every channel of every text, 16 at a time."""

    further = scales_after(kept_as)

    @inlined
    def body(tid, threads, job, a):
        channels, n = a.a.shape
        low, high = share(channels // 16, tid, threads)
        for q in range(job.sequences):
            first = a.index * channels
            states = np.int64(job.states[a.slot, q]) + first * n * kept_as.width
            scales = np.int64(job.states[a.slot + further, q]) + 4 * first
            for sixteen in range(low, high):
                scan_channels(kept_as, a, job.s, states, scales, job.past[q], q * job.length, job.length, 16 * sixteen)

    return body


@kernel
def scan_channels(kept_as, a, s, states, scales, past, first, rows, base):
    """The recurrence of the channels base..base + 16 over `rows` consecutive tokens, the first at position `past`, and the gate.

    states: the address of the states [channels, N] of all channels, which are updated; scales: of their scales, if they have them.
    """
    channels, n = a.a.shape
    row_bytes = n * kept_as.width
    states, scales, sums_at, area = states + base * row_bytes, scales + 4 * base, stack(1024), stack(AREA)
    dt_at, steps_at = stack(64), stack(64)
    dt, steps = floats_at(dt_at, 16), floats_at(steps_at, 16)
    olds, inverses = floats_at(area + OLD, 16), floats_at(area + INVERSE, 16)
    for r in range(first, first + rows):
        position = past + r - first
        if r == first or position % REFRESH == 0:
            begin_rows(kept_as, area, states, scales, n, position)
        for lane in range(16):
            dt[lane] = softplus(s.dt[r, base + lane] + a.dt_bias[base + lane])
        slowest = slowest_of(kept_as, peek(dt_at), a.slowest, base)
        top_b = top_of(kept_as, s.mid[r], a.rank, n)
        poke(steps_at, advance_rows(kept_as, area, slowest, peek(dt_at) * load(s.xbc[r], base), top_b))
        for lane in range(16):
            channel = base + lane
            step, fade, total = splat(steps[lane]), splat(dt[lane]), splat(ZERO)
            old, inverse = splat(olds[lane]), splat(inverses[lane])
            for i in range(0, n, 16):
                at = states + lane * row_bytes + i * kept_as.width
                decay = vector_exp(fade * load(a.a[channel], i))
                h = load_state(kept_as, at) * faded(kept_as, decay, old, inverse)
                h = h + step * load(s.mid[r, a.rank : a.rank + n], i)
                store_state(kept_as, at, h)
                total = total + h * load(s.mid[r, a.rank + n : a.rank + 2 * n], i)
            poke(sums_at + 64 * lane, total)
        y = in_unit(kept_as, tree_sums(floats_at(sums_at, 256)), peek(area + UNIT))
        y = y + load(a.d, base) * load(s.xbc[r], base)
        store(s.wide[r], base, y * vector_silu(load(s.proj[r], channels + base)))
        end_rows(kept_as, area, scales)


def check(branch: Mamba1) -> None:
    """Raises GGUFError for dimensions that the kernels do not compute."""
    sixteens("d_inner", branch.d_inner)
    sixteens("d_state", branch.d_state)


def room(branch: Mamba1) -> Room:
    """What its phases need of a Scratch."""
    inner = branch.d_inner
    return Room(wide=inner, proj=2 * inner, xbc=inner, mid=branch.dt_rank + 2 * branch.d_state, dt=inner)


# in the order that identifies a model's weights in saved states
SMALL = ("conv_weight", "conv_bias", "dt_bias", "a", "d")


def steps(layer: Layer) -> list[Step]:
    """The mixer of one layer, from its norm to its sum.

    Raises:
        GGUFError: damaged tensors, or types that the kernels do not compute.
    """
    c, small, activations = layer.branch, layer.small, layer.preset.activations
    x_proj, dt_proj, out = (layer.matrix(role) for role in ("x_proj", "dt_proj", "out_proj"))
    slowest = small["a"].max(axis=1) if scales_after(layer.preset.state) else np.zeros(0, np.float32)
    scan = Scan(small["a"], slowest, small["d"], small["dt_bias"], c.dt_rank, layer.slot + 1, layer.index)
    convolution = Convolution(small["conv_weight"], small["conv_bias"], 0, layer.slot, layer.index)
    read = [Span(MID, 0, c.dt_rank + 2 * c.d_state), Span(DT, 0, c.d_inner)]
    return [
        *layer.normed_product("in_proj", PROJ),
        Step(convolve_rows, convolution, updates=layer.slots[:1], inputs=[Span(PROJ, 0, c.d_inner)]),
        Step(convolved_rows(activations), Slice(c.d_inner, x_proj.block)),
        layer.product(x_proj, MID),
        Step(dt_rows(activations), Slice(c.dt_rank, dt_proj.block)),
        layer.product(dt_proj, DT),
        Step(scan_rows(layer.preset.state), scan, updates=layer.slots[1:], inputs=read),
        Step(quantize_rows(activations), Rows(c.d_inner, out.block)),
        *layer.output(out),
    ]
