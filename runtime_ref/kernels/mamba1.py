"""The Mamba-1 mixer (`reference.mamba1`): every channel has a decay for each of its states."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Activations, RecurrentState
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
from runtime_ref.kernels.states import load_state, store_state
from runtime_ref.kernels.vector import load, poke, splat, store, tree_sums
from tmexport.model.branches.mamba1 import Mamba1

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ZERO = np.float32(0.0)


class Slice(NamedTuple):
    """`count` values of s.xbc or of s.mid for the next product, which quantises them in blocks (0: it does not)."""

    count: int
    block: int


class Scan(NamedTuple):
    """a (= -exp(A_log)) fp32 [d_inner, N]; d, dt_bias [d_inner]; rank: of dt, before B and C in s.mid; slot, index: of the
    state.
    """

    a: np.ndarray
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

    @inlined
    def body(tid, threads, job, a):
        channels, n = a.a.shape
        low, high = share(channels // 16, tid, threads)
        for q in range(job.sequences):
            states = np.int64(job.states[a.slot, q]) + a.index * channels * n * kept_as.width
            for sixteen in range(low, high):
                scan_channels(kept_as, a, job.s, states, q * job.length, job.length, 16 * sixteen)

    return body


@kernel
def scan_channels(kept_as, a, s, states, first, rows, base):
    """The recurrence of the channels base..base + 16 over `rows` consecutive tokens, and the gate.

    states: the address of the states [channels, N] of all channels, which are updated.
    """
    channels, n = a.a.shape
    sums_at = stack(1024)
    for r in range(first, first + rows):
        for lane in range(16):
            channel = base + lane
            x, dt = s.xbc[r, channel], softplus(s.dt[r, channel] + a.dt_bias[channel])
            step, fade, total = splat(dt * x), splat(dt), splat(ZERO)
            for i in range(0, n, 16):
                at = states + (channel * n + i) * kept_as.width
                h = load_state(kept_as, at) * vector_exp(fade * load(a.a[channel], i))
                h = h + step * load(s.mid[r, a.rank : a.rank + n], i)
                store_state(kept_as, at, h)
                total = total + h * load(s.mid[r, a.rank + n : a.rank + 2 * n], i)
            poke(sums_at + 64 * lane, total)
        y = tree_sums(floats_at(sums_at, 256)) + load(a.d, base) * load(s.xbc[r], base)
        store(s.wide[r], base, y * vector_silu(load(s.proj[r], channels + base)))


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
    scan = Scan(small["a"], small["d"], small["dt_bias"], c.dt_rank, layer.slot + 1, layer.index)
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
