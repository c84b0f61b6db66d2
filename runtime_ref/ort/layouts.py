"""Phases for states as an ONNX graph has them: of a mixer [channels, taps] and [heads, d_state, headdim], keys [groups, positions, width].

Like the engine's phases (`kernels/phases.py`), whose kernels they call and whose bits they give; a Job's `states` are the addresses of
the operator's inputs, then of its outputs. What is read may lie where it is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Activations, Fp32
from runtime_ref.kernels.attend import LANES, attend_heads, attend_tokens
from runtime_ref.kernels.attention import FEWEST_TOKENS
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, kernel, made_for
from runtime_ref.kernels.convolution import convolve
from runtime_ref.kernels.isa import Isa
from runtime_ref.kernels.mamba2 import AHEAD, scan_head
from runtime_ref.kernels.math import exp, softplus, vector_silu
from runtime_ref.kernels.matmul import quantize_row
from runtime_ref.kernels.norm import rms_norm
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.vector import (
    address,
    ask_for,
    join_threes,
    load,
    part_threes,
    peek,
    poke,
    splat,
    store,
    transpose,
)
from runtime_ref.ort.compute import GROUPS, POSITIONS, SIZES, WIDTH

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

CONV, SSM, NEW_CONV, NEW_SSM = 1, 2, 4, 5  # of a scan's inputs and outputs
KEYS, VALUES = 1, 2  # of an attention's
TURNED = 8  # tokens from which on a head's state is turned to the engine's layout and back
ZERO = np.float32(0.0)


class Attention(NamedTuple):
    """scale: of the scores, an fp32."""

    scale: float


class Gate(NamedTuple):
    """Nothing: a gate has no weights."""


@inlined
def convolve_texts(tid, threads, job, a):
    """The convolution before a scan, from s.proj into s.xbc; s.sum: room for the last inputs, [texts, (K - 1) C]."""
    taps, channels = a.weight.shape
    keep, s = taps - 1, job.s
    low, high = tid * (channels // 16) // threads * 16, (tid + 1) * (channels // 16) // threads * 16
    for q in range(job.sequences):
        at = 4 * q * channels * keep
        old, new = np.int64(job.states[CONV, 0]) + at, np.int64(job.states[NEW_CONV, 0]) + at
        room = address(s.sum[q])
        by_tap(old, room, keep, channels, low, high)
        convolve(a, s, room, q * job.length, job.length, low, high)
        by_channel(room, new, keep, channels, low, high)


@made_for
def norm_texts(activations: Activations) -> Any:
    """The norm of the rows in s.dt, which go into s.x, quantised for the product."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s, d = job.s, a.weight.shape[0]
        for r in range(tid, job.rows, threads):
            for i in range(0, d, 16):
                store(s.x[r], i, load(s.dt[r], i))
            rms_norm(s.x[r], a.weight, s.wide[r, :d], a.eps)
            quantize_row(levels, s, r, d, a.block)

    return body


@kernel
def by_tap(source, target, keep, channels, low, high):
    """Channels low..high of [channels, keep] -> [keep, channels]."""
    if keep == 3:
        for c in range(low, high, 16):
            part_threes(source + 12 * c, target + 4 * c, 4 * channels)
    else:
        old, new = floats_at(source, keep * channels), floats_at(target, keep * channels)
        for tap in range(keep):
            for c in range(low, high):
                new[tap * channels + c] = old[c * keep + tap]


@kernel
def by_channel(source, target, keep, channels, low, high):
    """Channels low..high of [keep, channels] -> [channels, keep]."""
    if keep == 3:
        for c in range(low, high, 16):
            join_threes(source + 4 * c, 4 * channels, target + 12 * c)
    else:
        old, new = floats_at(source, keep * channels), floats_at(target, keep * channels)
        for tap in range(keep):
            for c in range(low, high):
                new[c * keep + tap] = old[tap * channels + c]


@made_for
def scan_texts(isa: Isa, kept_as: Fp32) -> Any:
    """Every head of every text, into s.wide; s.mid: room for one head's state for each thread."""

    @inlined
    def body(tid, threads, job, a):
        low, high = share(a.n_heads, tid, threads)
        for q in range(job.sequences):
            for head in range(low, high):
                at = 4 * (q * a.n_heads + head) * a.headdim * a.d_state
                old, new = np.int64(job.states[SSM, 0]) + at, np.int64(job.states[NEW_SSM, 0]) + at
                room, first = address(job.s.mid[tid]), q * job.length
                if 0 < job.length < TURNED:
                    for t in range(job.length):
                        scan_token(a, job.s, old, new, room, first + t, head)
                        old = new
                else:
                    turn(old, room, a.d_state, a.headdim)
                    scan_head(isa, kept_as, a, job.s, room, 0, 0, first, job.length, head)
                    turn(room, new, a.headdim, a.d_state)

    return body


@kernel
def turn(source, target, rows, columns):
    """A matrix fp32 [rows, columns] at an address -> [columns, rows] at another."""
    for i in range(0, rows, 16):
        for j in range(0, columns, 16):
            transpose(source + 4 * (i * columns + j), 4 * columns, target + 4 * (j * rows + i), 4 * rows)


@kernel
def scan_token(a, s, old, new, room, r, head):
    """`mamba2.scan_head` for one token, row r, with the state as [d_state, headdim] at `old`, the next at `new`.

    A channel's state goes down a column, so the 16 partial sums of the specification are 16 rows in `room`, and their tree adds rows.
    """
    n, width = a.d_state, a.headdim
    group, d_inner, base = head // (a.n_heads // a.n_groups), a.n_heads * width, head * width
    x, z = s.xbc[r], s.proj[r]
    b_first = d_inner + group * n
    c_first = b_first + a.n_groups * n
    dt = softplus(z[2 * d_inner + 2 * a.n_groups * n + head] + a.dt_bias[head])
    fade, step, steps = splat(exp(dt * a.a[head])), splat(dt), room + 64 * width
    for at in range(0, width, 16):
        poke(steps + 4 * at, step * load(x, base + at))
    for at in range(0, 16 * width, 16):
        poke(room + 4 * at, splat(ZERO))
    for i in range(n):
        b, c, sums = splat(x[b_first + i]), splat(x[c_first + i]), room + 4 * width * (i % 16)
        for at in range(0, 4 * width, 64):
            ask_for(old + at + AHEAD)
            h = peek(old + at) * fade + peek(steps + at) * b
            poke(new + at, h)
            poke(sums + at, peek(sums + at) + h * c)
        old, new = old + 4 * width, new + 4 * width
    skip = splat(a.d[head])
    for at in range(0, width, 16):
        half = 8
        while half:
            for i in range(half):
                place = room + 4 * (width * i + at)
                poke(place, peek(place) + peek(place + 4 * width * half))
            half //= 2
        y = peek(room + 4 * at) + skip * load(x, base + at)
        store(s.wide[r], base + at, y * vector_silu(load(z, base + at)))


@inlined
def gate_texts(tid, threads, job, a):
    """silu(gate) * up: s.proj and s.mid into s.wide."""
    s = job.s
    for r in range(tid, job.rows, threads):
        for i in range(0, s.wide.shape[1], 16):
            store(s.wide[r], i, vector_silu(load(s.proj[r], i)) * load(s.mid[r], i))


@made_for
def attend_texts(kept_as: Fp32) -> Any:
    """Attention from the turned queries in s.proj into s.wide; job.room: the sizes of the call."""

    @inlined
    def body(tid, threads, job, a):
        if job.length < FEWEST_TOKENS:
            _attend_each(kept_as, tid, threads, job, np.float32(a.scale))
        else:
            _attend_sixteens(kept_as, tid, threads, job, np.float32(a.scale))

    return body


@kernel
def _heads(job):
    """How many there are of queries and of keys, their width, and the positions of the keys."""
    width = job.room[SIZES + WIDTH]
    return job.s.proj.shape[1] // width, job.room[SIZES + GROUPS], width, job.room[SIZES + POSITIONS]


@kernel
def _attend_each(kept_as, tid, threads, job, scale):
    heads, groups, width, positions = _heads(job)
    group = heads // groups
    piece, high = share(job.rows * heads, tid, threads)
    while piece < high:
        r, head = piece // heads, piece % heads
        count, kv = min(high - piece, group - head % group, LANES), head // group
        # attend_heads looks for a group's keys beside those of the group before, for each position
        start = 4 * width * ((r // job.length * groups + kv) * positions - kv)
        k_at, v_at = np.int64(job.states[KEYS, 0]) + start, np.int64(job.states[VALUES, 0]) + start
        query, out, seen = address(job.s.proj[r]), address(job.s.wide[r]), job.past[0] + r % job.length + 1
        attend_heads(
            kept_as, head, count, group, query, k_at, v_at, out, job.scores[tid], seen, width, width, scale
        )  # fmt: skip
        piece += count


@kernel
def _attend_sixteens(kept_as, tid, threads, job, scale):
    heads, groups, width, positions = _heads(job)
    group, parts = heads // groups, -(-job.length // LANES)
    low, high = share(job.sequences * heads * parts, tid, threads)
    for piece in range(low, high):
        q, head, part = piece // (heads * parts), piece // parts % heads, piece % parts
        start = 4 * width * (q * groups + head // group) * positions
        k_at, v_at = np.int64(job.states[KEYS, 0]) + start, np.int64(job.states[VALUES, 0]) + start
        first, last = q * job.length + part * LANES, q * job.length + min(part * LANES + LANES, job.length)
        rows, wide, least = job.s.proj[first:last], job.s.wide[first:last], job.past[0] + part * LANES + 1
        attend_tokens(kept_as, head, rows, wide, k_at, v_at, job.scores[tid], least, width, width, scale)
