"""The causal convolution before a scan, with its silu (`reference.convolution`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.compiled import inlined, kernel
from runtime_ref.kernels.math import vector_silu
from runtime_ref.kernels.vector import LANES, address, peek, poke

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba

_VECTOR = 4 * LANES


class Convolution(NamedTuple):
    """weight fp32 [K, C], the oldest input's first, bias [C]; first: s.proj's column of the first channel; slot, index: of
    its state, the last K - 1 inputs.
    """

    weight: np.ndarray
    bias: np.ndarray
    first: int
    slot: int
    index: int


@inlined
def convolve_rows(tid, threads, job, a):
    taps, channels = a.weight.shape
    low, high = tid * (channels // 16) // threads, (tid + 1) * (channels // 16) // threads
    for q in range(job.sequences):
        past = np.int64(job.states[a.slot, q]) + 4 * a.index * (taps - 1) * channels
        convolve(a, job.s, past, q * job.length, job.length, low * 16, high * 16)


@kernel
def convolve(a, s, past, first, rows, low, high):
    """Channels low..high of the convolution over `rows` consecutive tokens; the state fp32 [K-1, C] at `past` is updated."""
    keep = a.weight.shape[0] - 1
    bias, weight = address(a.bias), address(a.weight)
    before, row = a.weight.strides[0], s.proj.strides[0]
    # of the channel 0, one row before the first token's at a time
    now = address(s.proj[first]) + 4 * a.first
    for t in range(rows):
        target = address(s.xbc[first + t])
        if keep == 3:
            x0 = now + (t - 3) * row if t >= 3 else past + t * before
            x1 = now + (t - 2) * row if t >= 2 else past + (t + 1) * before
            x2 = now + (t - 1) * row if t >= 1 else past + (t + 2) * before
            x3 = now + t * row
            w0, w1, w2, w3 = weight, weight + before, weight + 2 * before, weight + 3 * before
            for at in range(4 * low, 4 * high, _VECTOR):
                total = peek(bias + at) + peek(w0 + at) * peek(x0 + at)
                total = total + peek(w1 + at) * peek(x1 + at)
                total = total + peek(w2 + at) * peek(x2 + at)
                total = total + peek(w3 + at) * peek(x3 + at)
                poke(target + at, vector_silu(total))
        else:
            for at in range(4 * low, 4 * high, _VECTOR):
                total = peek(bias + at)
                for tap in range(keep + 1):
                    age = t + tap - keep
                    x = now + age * row if age >= 0 else past + (t + tap) * before
                    total = total + peek(weight + tap * before + at) * peek(x + at)
                poke(target + at, vector_silu(total))
    for tap in range(keep):
        age = rows + tap - keep
        x = now + age * row if age >= 0 else past + (rows + tap) * before
        for at in range(4 * low, 4 * high, _VECTOR):
            poke(past + tap * before + at, peek(x + at))
