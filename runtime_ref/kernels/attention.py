"""Causal attention (`reference.attention`): the phases of a layer; attend.py has what computes its heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Fp16, Fp32
from runtime_ref.kernels.attend import LANES, MOST_WIDTH, attend_heads, attend_tokens
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, kernel, made_for
from runtime_ref.kernels.layers import Layer, sixteens
from runtime_ref.kernels.phases import DT, MID, PROJ, Rows, quantize_rows
from runtime_ref.kernels.program import Step
from runtime_ref.kernels.scratch import Room
from runtime_ref.kernels.states import store_state
from runtime_ref.kernels.vector import address, load
from tmexport.errors import GGUFError
from tmexport.model.branches.attention import Attention
from tmexport.model.rope import NEAR, context_limit, rope_tables

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

FEWEST_TOKENS = 4  # of a text; below, most of 16 lanes would be idle


class Turn(NamedTuple):
    """Heads of queries and of keys, of `width` values; far, near: `rope_tables`, or [0, 0]; biases [n] or [0]; slot, index: of
    the keys' array, which the values' follows.
    """

    heads: int
    kv_heads: int
    width: int
    far: np.ndarray
    near: np.ndarray
    q_bias: np.ndarray
    k_bias: np.ndarray
    v_bias: np.ndarray
    slot: int
    index: int


class Attend(NamedTuple):
    """As in Turn; scale: of the scores, an fp32."""

    heads: int
    kv_heads: int
    width: int
    scale: float
    slot: int
    index: int


@made_for
def turn_rows(kept_as: Fp32 | Fp16) -> Any:
    """Biases, RoPE of queries and keys, and keys and values into the state: heads of queries, then heads of keys of every row."""

    @inlined
    def body(tid, threads, job, a):
        s, keys, every = job.s, a.kv_heads * a.width, a.heads + a.kv_heads
        piece, end = share(job.rows * every, tid, threads)
        while piece < end:
            r, first = piece // every, piece % every
            last = min(every, first + end - piece)
            piece += last - first
            q = r // job.length
            position = job.past[q] + r % job.length
            low, high = min(first, a.heads) * a.width, min(last, a.heads) * a.width
            k_low, k_high = max(first - a.heads, 0) * a.width, max(last - a.heads, 0) * a.width
            add_bias(s.proj[r], a.q_bias, low, high)
            add_bias(s.mid[r], a.k_bias, k_low, k_high)
            add_bias(s.dt[r], a.v_bias, k_low, k_high)
            if a.far.shape[0]:
                angles = job.scores[tid]
                angles_at(angles, a.width // 2, a.far[position // NEAR], a.near[position % NEAR])
                turn(s.proj[r], low, high, a.width, angles)
                turn(s.mid[r], k_low, k_high, a.width, angles)
            row = (a.index * job.room[q] + position) * keys * kept_as.width
            k_at, v_at = np.int64(job.states[a.slot, q]) + row, np.int64(job.states[a.slot + 1, q]) + row
            for i in range(k_low, k_high, 16):
                store_state(kept_as, k_at + i * kept_as.width, load(s.mid[r], i))
                store_state(kept_as, v_at + i * kept_as.width, load(s.dt[r], i))

    return body


@kernel
def add_bias(row, bias, low, high):
    if bias.shape[0]:
        for i in range(low, high):
            row[i] = row[i] + bias[i]


@kernel
def angles_at(angles, half, far, near):
    """The cosines and sines of a position, which are made in fp64 and rounded once."""
    for i in range(half):
        angles[i] = np.float32(far[i] * near[i] - far[half + i] * near[half + i])
        angles[half + i] = np.float32(far[half + i] * near[i] + far[i] * near[half + i])


@kernel
def turn(row, low, high, width, angles):
    """RoPE of the heads of one row in low..high."""
    half = width // 2
    for at in range(low, high, width):
        for i in range(half):
            cos, sin, first, second = angles[i], angles[half + i], row[at + i], row[at + half + i]
            row[at + i] = first * cos - second * sin
            row[at + half + i] = second * cos + first * sin


@made_for
def attend_rows(kept_as: Fp32 | Fp16) -> Any:
    """The heads of every row, into s.wide: those of a row that read the same keys together."""

    @inlined
    def body(tid, threads, job, a):
        attend_each(kept_as, tid, threads, job, a)

    return body


@made_for
def attend_many(kept_as: Fp32 | Fp16) -> Any:
    """As `attend_rows`; of texts of several tokens, 16 at a time."""

    @inlined
    def body(tid, threads, job, a):
        if job.length < FEWEST_TOKENS:
            attend_each(kept_as, tid, threads, job, a)
        else:
            attend_sixteens(kept_as, tid, threads, job, a)

    return body


@kernel
def attend_each(kept_as, tid, threads, job, a):
    keys, group = a.kv_heads * a.width, a.heads // a.kv_heads
    piece, high = share(job.rows * a.heads, tid, threads)
    while piece < high:
        r, head = piece // a.heads, piece % a.heads
        q = r // job.length
        heads = min(high - piece, a.heads - head, LANES)
        start = a.index * job.room[q] * keys * kept_as.width
        k_at, v_at = np.int64(job.states[a.slot, q]) + start, np.int64(job.states[a.slot + 1, q]) + start
        query, out, count = address(job.s.proj[r]), address(job.s.wide[r]), job.past[q] + r % job.length + 1
        scores, scale = job.scores[tid], np.float32(a.scale)
        attend_heads(kept_as, head, heads, group, query, k_at, v_at, out, scores, count, a.width, keys, scale)
        piece += heads


@kernel
def attend_sixteens(kept_as, tid, threads, job, a):
    keys, group, parts = a.kv_heads * a.width, a.heads // a.kv_heads, -(-job.length // LANES)
    low, high = share(job.sequences * a.heads * parts, tid, threads)
    for piece in range(low, high):
        q, head, part = piece // (a.heads * parts), piece // parts % a.heads, piece % parts
        start = (a.index * job.room[q] * keys + head // group * a.width) * kept_as.width
        k_at, v_at = np.int64(job.states[a.slot, q]) + start, np.int64(job.states[a.slot + 1, q]) + start
        first, last = q * job.length + part * LANES, q * job.length + min(part * LANES + LANES, job.length)
        rows, wide, least = job.s.proj[first:last], job.s.wide[first:last], job.past[q] + part * LANES + 1
        attend_tokens(kept_as, head, rows, wide, k_at, v_at, job.scores[tid], least, a.width, keys, np.float32(a.scale))


def check(branch: Attention) -> None:
    """Raises GGUFError for dimensions that the kernels do not compute."""
    sixteens("head_dim", branch.head_dim)
    if branch.head_dim > MOST_WIDTH:
        raise GGUFError(f"head_dim is {branch.head_dim}; this runtime needs at most {MOST_WIDTH}")


def room(branch: Attention) -> Room:
    """What its phases need of a Scratch."""
    inner, keys = branch.n_heads * branch.head_dim, branch.n_kv_heads * branch.head_dim
    return Room(wide=inner, proj=inner, mid=keys, dt=keys)


# in the order that identifies a model's weights in saved states
SMALL = ("q_bias", "k_bias", "v_bias", "o_bias")


def steps(layer: Layer) -> list[Step]:
    """The attention of one layer, from its norm to its sum.

    Raises:
        GGUFError: damaged tensors, or types that the kernels do not compute.
    """
    c, small, none, kept_as = layer.branch, layer.small, np.zeros(0, np.float32), layer.preset.cache
    q_bias, k_bias, v_bias = (small.get(f"{name}_bias", none) for name in "qkv")
    tables = (np.zeros((0, 0)), np.zeros((0, 0)))
    if c.rope_theta is not None:
        tables = rope_tables(c.rope_theta, c.head_dim, context_limit(layer.source.config.context_length))
    turned = Turn(c.n_heads, c.n_kv_heads, c.head_dim, *tables, q_bias, k_bias, v_bias, layer.slot, layer.index)
    attended = Attend(c.n_heads, c.n_kv_heads, c.head_dim, c.scale, layer.slot, layer.index)
    out = layer.matrix("o_proj")
    return [
        *layer.normed_products({"q_proj": PROJ, "k_proj": MID, "v_proj": DT}),
        Step(turn_rows(kept_as), turned),
        Step(attend_rows(kept_as), attended, attend_many(kept_as)),
        Step(quantize_rows(layer.preset.activations), Rows(out.k, out.block)),
        *layer.output(out, small.get("o_bias")),
    ]
