"""One forward pass, run by all threads at once: phases with barriers between them, no Python in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import carray, njit

from runtime_ref.kernels.cache import cached, source_digest
from runtime_ref.kernels.intrinsics import atomic_add, atomic_load, atomic_store, pointer_f32, sched_yield
from runtime_ref.kernels.mamba2 import convolve, scan_head, state_pointer
from runtime_ref.kernels.matmul import embed, multiply, prepare
from runtime_ref.kernels.vector import load, splat, store, tree_sum, widen

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

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
def _share(total, tid, threads):
    return tid * total // threads, (tid + 1) * total // threads


def _compiled(digest: int) -> Callable[..., None]:
    @cached(nogil=True)
    def run(
        tid, threads, sync, isa, activations, state, dims, small, embedding, in_proj, out_proj, head, s,
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
                prepare(activations, in_proj, s, r, d, dims.in_block)
            barrier(sync, threads)
            multiply(isa, activations, in_proj, layer, s, rows, d, dims.in_block, s.proj, False, tid, threads)
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
                ssm = carray(state_pointer(state, ssm_at[q]), shape)[layer]
                for h in range(low, high):
                    scan_head(isa, state, dims, small, layer, s, ssm, q * length, length, h)
            barrier(sync, threads)
            part = dims.d_inner // dims.n_groups
            for r in range(tid, rows, threads):
                for g in range(dims.n_groups):
                    span = s.wide[r, g * part : (g + 1) * part]
                    rms_norm(span, small.gate_norm[layer, g * part : (g + 1) * part], span, dims.eps)
                prepare(activations, out_proj, s, r, dims.d_inner, dims.out_block)
            barrier(sync, threads)
            multiply(isa, activations, out_proj, layer, s, rows, dims.d_inner, dims.out_block, s.x, True, tid, threads)
            barrier(sync, threads)
        wanted = rows if all_logits else sequences
        for r in range(tid, rows, threads):
            if all_logits or r % length == length - 1:
                target = r if all_logits else r // length
                finite = rms_norm(s.x[r], small.norm_f, s.wide[target, :d], dims.eps)
                prepare(activations, head, s, target, d, dims.head_block)
            else:
                finite = rms_norm(s.x[r], small.norm_f, s.x[r], dims.eps)
            if not finite and s.bad[r] < 0:
                s.bad[r] = dims.n_layer
        barrier(sync, threads)
        multiply(isa, activations, head, 0, s, wanted, d, dims.head_block, logits, False, tid, threads)
        barrier(sync, threads)

    return run


run = _compiled(source_digest())
