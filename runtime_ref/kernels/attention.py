"""Causal attention (`reference.attention`): a head of a token is one piece of work, which passes over the positions three times."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Fp16, Fp32
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, kernel, made_for, stack
from runtime_ref.kernels.layers import Layer, sixteens
from runtime_ref.kernels.math import vector_exp
from runtime_ref.kernels.phases import DT, MID, PROJ, Rows, quantize_rows
from runtime_ref.kernels.program import Step
from runtime_ref.kernels.records import floats_at
from runtime_ref.kernels.scratch import Room
from runtime_ref.kernels.states import load_state, store_state
from runtime_ref.kernels.vector import address, load, peek, poke, splat, store, tree_sum, tree_sums
from tmexport.model.branches.attention import Attention
from tmexport.model.rope import NEAR, context_limit, rope_tables

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ZERO = np.float32(0.0)


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
    """Biases, RoPE of queries and keys, and the row's keys and values into the state."""

    @inlined
    def body(tid, threads, job, a):
        s, keys = job.s, a.kv_heads * a.width
        for r in range(tid, job.rows, threads):
            q = r // job.length
            position = job.past[q] + r % job.length
            add_bias(s.proj[r], a.q_bias)
            add_bias(s.mid[r], a.k_bias)
            add_bias(s.dt[r], a.v_bias)
            if a.far.shape[0]:
                far, near = a.far[position // NEAR], a.near[position % NEAR]
                turn(s.proj[r], a.heads, a.width, far, near)
                turn(s.mid[r], a.kv_heads, a.width, far, near)
            row = (a.index * job.room[q] + position) * keys * kept_as.width
            k_at, v_at = np.int64(job.states[a.slot, q]) + row, np.int64(job.states[a.slot + 1, q]) + row
            for i in range(0, keys, 16):
                store_state(kept_as, k_at + i * kept_as.width, load(s.mid[r], i))
                store_state(kept_as, v_at + i * kept_as.width, load(s.dt[r], i))

    return body


@kernel
def add_bias(row, bias):
    for i in range(bias.shape[0]):
        row[i] = row[i] + bias[i]


@kernel
def turn(row, heads, width, far, near):
    """RoPE of the heads of one row; the angle's cosine and sine are made in fp64 and rounded once."""
    half = width // 2
    for i in range(half):
        cos = np.float32(far[i] * near[i] - far[half + i] * near[half + i])
        sin = np.float32(far[half + i] * near[i] + far[i] * near[half + i])
        for head in range(heads):
            at = head * width + i
            first, second = row[at], row[at + half]
            row[at] = first * cos - second * sin
            row[at + half] = second * cos + first * sin


@made_for
def attend_rows(kept_as: Fp32 | Fp16) -> Any:
    """The heads of every row, into s.wide; those that read the same keys one after another."""

    @inlined
    def body(tid, threads, job, a):
        keys, group = a.kv_heads * a.width, a.heads // a.kv_heads
        low, high = share(job.rows * a.heads, tid, threads)
        for piece in range(low, high):
            head, r = piece // job.rows, piece % job.rows
            q = r // job.length
            count = job.past[q] + r % job.length + 1
            start = (a.index * job.room[q] * keys + head // group * a.width) * kept_as.width
            k_at, v_at = np.int64(job.states[a.slot, q]) + start, np.int64(job.states[a.slot + 1, q]) + start
            query, out = address(job.s.proj[r]) + 4 * head * a.width, address(job.s.wide[r]) + 4 * head * a.width
            attend(kept_as, query, k_at, v_at, out, job.scores[tid], count, a.width, keys, np.float32(a.scale))

    return body


@kernel
def attend(kept_as, query, k_at, v_at, out, scores, count, width, keys, scale):
    """One head of one token: `width` values at `out` from the query and `count` positions, `keys` values apart."""
    step = keys * kept_as.width
    sums_at, whole = stack(1024), count // 16 * 16
    largest = np.float32(-np.inf)
    for first in range(0, count, 16):
        for lane in range(16):
            total = splat(ZERO)
            if first + lane < count:
                at = k_at + (first + lane) * step
                for i in range(0, width, 16):
                    total = total + peek(query + 4 * i) * load_state(kept_as, at + i * kept_as.width)
            poke(sums_at + 64 * lane, total)
        store(scores, first, tree_sums(floats_at(sums_at, 256)) * splat(scale))
        for lane in range(min(16, count - first)):
            score = scores[first + lane]
            largest = score if score > largest else largest
    lanes = splat(ZERO)
    for first in range(0, whole, 16):
        e = vector_exp(load(scores, first) - splat(largest))
        store(scores, first, e)
        lanes = lanes + e
    if whole < count:
        store(scores, whole, vector_exp(load(scores, whole) - splat(largest)))
        for i in range(count, whole + 16):
            scores[i] = ZERO
        lanes = lanes + load(scores, whole)
    total = splat(tree_sum(lanes))
    for first in range(0, count, 16):
        store(scores, first, load(scores, first) / total)
    i = 0
    while i + 64 <= width:
        values = v_at + i * kept_as.width
        y0, y1, y2, y3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
        for position in range(count):
            p, at = splat(scores[position]), values + position * step
            y0 = y0 + p * load_state(kept_as, at)
            y1 = y1 + p * load_state(kept_as, at + 16 * kept_as.width)
            y2 = y2 + p * load_state(kept_as, at + 32 * kept_as.width)
            y3 = y3 + p * load_state(kept_as, at + 48 * kept_as.width)
        poke(out + 4 * i, y0)
        poke(out + 4 * i + 64, y1)
        poke(out + 4 * i + 128, y2)
        poke(out + 4 * i + 192, y3)
        i += 64
    while i < width:
        values, y0 = v_at + i * kept_as.width, splat(ZERO)
        for position in range(count):
            y0 = y0 + splat(scores[position]) * load_state(kept_as, values + position * step)
        poke(out + 4 * i, y0)
        i += 16


def check(branch: Attention) -> None:
    """Raises GGUFError for dimensions that the kernels do not compute."""
    sixteens("head_dim", branch.head_dim)


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
    out = layer.matrix("o_proj")
    return [
        *layer.normed_products({"q_proj": PROJ, "k_proj": MID, "v_proj": DT}),
        Step(turn_rows(kept_as), turned),
        Step(attend_rows(kept_as), Attend(c.n_heads, c.n_kv_heads, c.head_dim, c.scale, layer.slot, layer.index)),
        Step(quantize_rows(layer.preset.activations), Rows(out.k, out.block)),
        *layer.output(out, small.get("o_bias")),
    ]
