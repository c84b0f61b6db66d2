"""One forward pass, run by all threads at once: phases with barriers between them, no Python in between."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numba.extending import overload

from runtime_ref.kernels.intrinsics import (
    atomic_add,
    atomic_load,
    atomic_store,
    float_to_half,
    half_to_float,
    pointer_f32,
    pointer_u16,
    sched_yield,
)
from runtime_ref.kernels.math import exp, silu, softplus
from runtime_ref.kernels.matmul import embed, multiply, prepare, tree16
from runtime_ref.kernels.profiles import Exact

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ZERO = np.float32(0.0)
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
    lanes = np.zeros(16, np.float64)
    for start in range(0, n, 16):
        for i in range(min(16, n - start)):
            wide = np.float64(x[start + i])
            lanes[i] += wide * wide
    mean = tree16(lanes) / np.float64(n)
    inverse = np.float32(1.0 / np.sqrt(mean + eps))
    for i in range(n):
        out[i] = (x[i] * inverse) * weight[i]
    return np.isfinite(mean)


@njit
def convolve(dims, small, layer, s, conv, first, rows, low, high):
    """Channels low..high of the causal convolution over `rows` consecutive tokens; `conv` [K-1, C] is updated."""
    taps = dims.d_conv
    for t in range(rows):
        for c in range(low, high):
            total = small.conv_bias[layer, c]
            for tap in range(taps):
                age = t + tap - (taps - 1)
                value = conv[t + tap, c] if age < 0 else s.proj[first + age, dims.d_inner + c]
                total = total + small.conv_weight[layer, tap, c] * value
            s.xbc[first + t, c] = silu(total)
    for tap in range(taps - 1):
        age = rows + tap - (taps - 1)
        for c in range(low, high):
            conv[tap, c] = conv[rows + tap, c] if age < 0 else s.proj[first + age, dims.d_inner + c]


def state_pointer(profile, address):
    """The SSM state at an address: fp32, or the bits of fp16."""


@overload(state_pointer)
def _state_pointer(profile, address):
    if profile.instance_class is Exact:
        return lambda profile, address: pointer_f32(address)
    return lambda profile, address: pointer_u16(address)


def read_state(profile, value):
    """A stored state value in fp32."""


@overload(read_state)
def _read_state(profile, value):
    return (
        (lambda profile, value: value)
        if profile.instance_class is Exact
        else (lambda profile, value: half_to_float(value))
    )


def round_state(profile, value):
    """An fp32 value as it is stored."""


@overload(round_state)
def _round_state(profile, value):
    return (
        (lambda profile, value: value)
        if profile.instance_class is Exact
        else (lambda profile, value: float_to_half(value))
    )


@njit
def scan_head(profile, dims, small, layer, s, ssm, first, rows, head):
    """The recurrence of one head over `rows` consecutive tokens, and the gate; ssm [H, P, N] is updated."""
    width, n = dims.headdim, dims.d_state
    group = head // (dims.n_heads // dims.n_groups)
    b_at = dims.d_inner + group * n
    c_at = b_at + dims.n_groups * n
    lanes = np.empty(16, np.float32)
    for r in range(first, first + rows):
        dt = softplus(s.proj[r, dims.d_inner + dims.conv_dim + head] + small.dt_bias[layer, head])
        decay = exp(dt * small.a[layer, head])
        for p in range(width):
            channel = head * width + p
            x = s.xbc[r, channel]
            dtx = dt * x
            lanes[:] = ZERO
            for start in range(0, n, 16):
                for i in range(min(16, n - start)):
                    h = read_state(profile, ssm[head, p, start + i]) * decay
                    h = h + dtx * s.xbc[r, b_at + start + i]
                    ssm[head, p, start + i] = round_state(profile, h)
                    lanes[i] += h * s.xbc[r, c_at + start + i]
            y = tree16(lanes) + small.d[layer, head] * x
            s.wide[r, channel] = y * silu(s.proj[r, channel])


@njit
def _share(total, tid, threads):
    return tid * total // threads, (tid + 1) * total // threads


@njit(nogil=True, cache=True)
def run(
    tid, threads, sync, isa, profile, dims, small, embedding, in_proj, out_proj, head, s,
    tokens, conv_at, ssm_at, sequences, length, all_logits, logits,
):  # fmt: skip
    """Forward `sequences` * `length` tokens (row-major) through the model; every thread calls this with its own tid.

    conv_at, ssm_at: uint64 addresses of each sequence's state. logits [rows, vocab], or [sequences, vocab] for the last
    token of each sequence only (all_logits False). s.bad tells the layer of the first Inf or NaN.
    """
    rows = sequences * length
    d = dims.d_model
    for r in range(tid, rows, threads):
        embed(embedding, tokens[r], s.x[r])
        s.bad[r] = -1
    for layer in range(dims.n_layer):
        for r in range(tid, rows, threads):
            if not rms_norm(s.x[r], small.norm[layer], s.wide[r, :d], dims.eps) and s.bad[r] < 0:
                s.bad[r] = layer
            s.wide[r, d:] = ZERO
            prepare(profile, in_proj, s, r, d, dims.in_block)
        barrier(sync, threads)
        multiply(isa, profile, in_proj, layer, s, rows, d, dims.in_block, s.proj, False, tid, threads)
        barrier(sync, threads)
        low, high = _share(dims.conv_dim, tid, threads)
        for q in range(sequences):
            at = conv_at[q] + np.uint64(4 * layer * (dims.d_conv - 1) * dims.conv_dim)
            conv = carray(pointer_f32(at), (dims.d_conv - 1, dims.conv_dim))
            convolve(dims, small, layer, s, conv, q * length, length, low, high)
        barrier(sync, threads)
        low, high = _share(dims.n_heads, tid, threads)
        shape = (dims.n_layer, dims.n_heads, dims.headdim, dims.d_state)
        for q in range(sequences):
            ssm = carray(state_pointer(profile, ssm_at[q]), shape)[layer]
            for h in range(low, high):
                scan_head(profile, dims, small, layer, s, ssm, q * length, length, h)
        barrier(sync, threads)
        part = dims.d_inner // dims.n_groups
        for r in range(tid, rows, threads):
            for g in range(dims.n_groups):
                span = s.wide[r, g * part : (g + 1) * part]
                rms_norm(span, small.gate_norm[layer, g * part : (g + 1) * part], span, dims.eps)
            s.wide[r, dims.d_inner :] = ZERO
            prepare(profile, out_proj, s, r, dims.d_inner, dims.out_block)
        barrier(sync, threads)
        multiply(isa, profile, out_proj, layer, s, rows, dims.d_inner, dims.out_block, s.x, True, tid, threads)
        barrier(sync, threads)
    wanted = rows if all_logits else sequences
    for r in range(tid, rows, threads):
        if all_logits or r % length == length - 1:
            target = r if all_logits else r // length
            finite = rms_norm(s.x[r], small.norm_f, s.wide[target, :d], dims.eps)
            s.wide[target, d:] = ZERO
            prepare(profile, head, s, target, d, 32)
        else:
            finite = rms_norm(s.x[r], small.norm_f, s.x[r], dims.eps)
        if not finite and s.bad[r] < 0:
            s.bad[r] = dims.n_layer
    barrier(sync, threads)
    multiply(isa, profile, head, 0, s, wanted, d, 32, logits, False, tid, threads)
    barrier(sync, threads)
