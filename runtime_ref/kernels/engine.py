"""One forward pass, run by all threads at once: phases with barriers between them, no Python in between."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import carray, njit
from numba.extending import overload

from runtime_ref.kernels.intrinsics import (
    atomic_add,
    atomic_load,
    atomic_store,
    pointer_f32,
    pointer_u16,
    sched_yield,
)
from runtime_ref.kernels.math import exp, softplus, vector_silu
from runtime_ref.kernels.matmul import embed, multiply, prepare
from runtime_ref.kernels.profiles import Exact
from runtime_ref.kernels.vector import load, prefetch, splat, store, tree_sum, tree_sums, widen

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ZERO = np.float32(0.0)
PART = 32  # channels of a head whose state is updated together
AHEAD = 1024  # state elements to ask for in advance
SPINS = 2000  # a few microseconds: longer than a phase's imbalance, far shorter than a time slice


@njit
def barrier(sync, threads):
    """Wait until all threads are here. sync int64: [0] arrived, [8] generation."""
    if threads == 1:
        return
    generation = atomic_load(sync, 8)
    if atomic_add(sync, 0, 1) == threads - 1:
        atomic_store(sync, 0, 0)
        atomic_store(sync, 8, generation + 1)
    else:
        spins = 0
        while atomic_load(sync, 8) == generation:
            spins += 1
            if spins > SPINS:
                sched_yield()


@njit
def rms_norm(x, weight, out, eps):
    """`reference.rms_norm` of one vector; returns False if it holds an Inf or a NaN."""
    n = x.shape[0]
    lanes = splat(np.float64(0.0))
    for i in range(0, n, 16):
        wide = widen(load(x, i))
        lanes = lanes + wide * wide
    mean = tree_sum(lanes) / np.float64(n)
    inverse = splat(np.float32(1.0 / np.sqrt(mean + eps)))
    for i in range(0, n, 16):
        store(out, i, (load(x, i) * inverse) * load(weight, i))
    return np.isfinite(mean)


@njit
def convolve(dims, small, layer, s, conv, first, rows, low, high):
    """Channels low..high of the causal convolution over `rows` consecutive tokens; `conv` [K-1, C] is updated."""
    taps = dims.d_conv
    bias, weight = small.conv_bias[layer], small.conv_weight[layer]
    for t in range(rows):
        target = s.xbc[first + t]
        for c in range(low, high, 16):
            total = load(bias, c)
            for tap in range(taps):
                age = t + tap - (taps - 1)
                value = load(conv[t + tap], c) if age < 0 else load(s.proj[first + age], dims.d_inner + c)
                total = total + load(weight[tap], c) * value
            store(target, c, vector_silu(total))
    for tap in range(taps - 1):
        age = rows + tap - (taps - 1)
        for c in range(low, high, 16):
            if age < 0:
                store(conv[tap], c, load(conv[rows + tap], c))
            else:
                store(conv[tap], c, load(s.proj[first + age], dims.d_inner + c))


def state_pointer(profile, address):
    """The SSM state at an address: fp32, or the bits of fp16."""


@overload(state_pointer)
def _state_pointer(profile, address):
    if profile.instance_class is Exact:
        return lambda profile, address: pointer_f32(address)
    return lambda profile, address: pointer_u16(address)


@njit
def scan_head(dims, small, layer, s, ssm, first, rows, head):
    """The recurrence of one head over `rows` consecutive tokens, and the gate; ssm [H, P, N] is updated."""
    for p in range(0, dims.headdim, PART):
        _scan_part(dims, small, layer, s, ssm, first, rows, head, p, min(p + PART, dims.headdim))


@njit
def _scan_part(dims, small, layer, s, ssm, first, rows, head, p_first, p_end):
    """Channels p_first..p_end of a head: few enough that their state stays in the first-level cache from token to token.

    The state's loads and stores convert to and from fp32, so y reads the new state before it is rounded.
    """
    n, base = dims.d_state, head * dims.headdim
    group = head // (dims.n_heads // dims.n_groups)
    b_at = dims.d_inner + group * n
    c_at = b_at + dims.n_groups * n
    skip = splat(small.d[layer, head])
    states, sums = ssm[head], np.empty(256, np.float32)
    for r in range(first, first + rows):
        dt = softplus(s.proj[r, dims.d_inner + dims.conv_dim + head] + small.dt_bias[layer, head])
        decay = splat(exp(dt * small.a[layer, head]))
        xbc, y_row, z_row = s.xbc[r], s.wide[r], s.proj[r]
        for p_low in range(p_first, p_end, 16):
            for p in range(p_low, p_low + 16, 2):  # two channels at a time share the loads of B and C
                h_row, h_next = states[p], states[p + 1]
                dtx, dtx_next = splat(dt * xbc[base + p]), splat(dt * xbc[base + p + 1])
                lanes, lanes_next = splat(ZERO), splat(ZERO)
                for i in range(0, n, 16):
                    prefetch(h_row, i + AHEAD)
                    prefetch(h_next, i + AHEAD)
                    b, c = load(xbc, b_at + i), load(xbc, c_at + i)
                    h = load(h_row, i) * decay + dtx * b
                    store(h_row, i, h)
                    lanes = lanes + h * c
                    h = load(h_next, i) * decay + dtx_next * b
                    store(h_next, i, h)
                    lanes_next = lanes_next + h * c
                store(sums, (p - p_low) * 16, lanes)
                store(sums, (p - p_low) * 16 + 16, lanes_next)
            channel = base + p_low
            y = tree_sums(sums) + skip * load(xbc, channel)
            store(y_row, channel, y * vector_silu(load(z_row, channel)))


@njit
def _share(total, tid, threads):
    return tid * total // threads, (tid + 1) * total // threads


def source_digest() -> int:
    """A digest of the kernels' source: numba's cache itself notices changes to this one file only."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


def _compiled(digest: int) -> Callable[..., None]:
    @njit(nogil=True, cache=True)
    def run(
        tid, threads, sync, isa, profile, dims, small, embedding, in_proj, out_proj, head, s,
        tokens, conv_at, ssm_at, sequences, length, all_logits, logits,
    ):  # fmt: skip
        """Forward `sequences` * `length` tokens (row-major) through the model; every thread calls this with its own tid.

        conv_at, ssm_at: uint64 addresses of each sequence's state. logits [rows, vocab], or [sequences, vocab] for the last
        token of each sequence only (all_logits False). s.bad tells the layer of the first Inf or NaN.
        """
        _ = digest  # a free variable is part of the cache's key
        rows = sequences * length
        d = dims.d_model
        for r in range(tid, rows, threads):
            embed(embedding, tokens[r], s.x[r])
            s.bad[r] = -1
        for layer in range(dims.n_layer):
            for r in range(tid, rows, threads):
                if not rms_norm(s.x[r], small.norm[layer], s.wide[r, :d], dims.eps) and s.bad[r] < 0:
                    s.bad[r] = layer
                prepare(profile, in_proj, s, r, d, dims.in_block)
            barrier(sync, threads)
            multiply(isa, profile, in_proj, layer, s, rows, d, dims.in_block, s.proj, False, tid, threads)
            barrier(sync, threads)
            low, high = _share(dims.conv_dim // 16, tid, threads)
            for q in range(sequences):
                at = conv_at[q] + np.uint64(4 * layer * (dims.d_conv - 1) * dims.conv_dim)
                conv = carray(pointer_f32(at), (dims.d_conv - 1, dims.conv_dim))
                convolve(dims, small, layer, s, conv, q * length, length, low * 16, high * 16)
            barrier(sync, threads)
            low, high = _share(dims.n_heads, tid, threads)
            shape = (dims.n_layer, dims.n_heads, dims.headdim, dims.d_state)
            for q in range(sequences):
                ssm = carray(state_pointer(profile, ssm_at[q]), shape)[layer]
                for h in range(low, high):
                    scan_head(dims, small, layer, s, ssm, q * length, length, h)
            barrier(sync, threads)
            part = dims.d_inner // dims.n_groups
            for r in range(tid, rows, threads):
                for g in range(dims.n_groups):
                    span = s.wide[r, g * part : (g + 1) * part]
                    rms_norm(span, small.gate_norm[layer, g * part : (g + 1) * part], span, dims.eps)
                prepare(profile, out_proj, s, r, dims.d_inner, dims.out_block)
            barrier(sync, threads)
            multiply(isa, profile, out_proj, layer, s, rows, dims.d_inner, dims.out_block, s.x, True, tid, threads)
            barrier(sync, threads)
        wanted = rows if all_logits else sequences
        for r in range(tid, rows, threads):
            if all_logits or r % length == length - 1:
                target = r if all_logits else r // length
                finite = rms_norm(s.x[r], small.norm_f, s.wide[target, :d], dims.eps)
                prepare(profile, head, s, target, d, 32)
            else:
                finite = rms_norm(s.x[r], small.norm_f, s.x[r], dims.eps)
            if not finite and s.bad[r] < 0:
                s.bad[r] = dims.n_layer
        barrier(sync, threads)
        multiply(isa, profile, head, 0, s, wanted, d, 32, logits, False, tid, threads)
        barrier(sync, threads)

    return run


run = _compiled(source_digest())
