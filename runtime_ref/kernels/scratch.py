"""The working arrays of a forward pass over R rows (a row is one token of one sequence)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tmexport.config import Mamba2Config

CHUNK = 64  # rows of a forward pass: enough to use each unpacked weight often, few enough to stay in cache


class Dims(NamedTuple):
    """The dimensions the kernels need; see Mamba2Config."""

    d_model: int
    d_inner: int
    conv_dim: int
    d_in_proj: int
    n_heads: int
    headdim: int
    d_state: int
    n_groups: int
    d_conv: int
    n_layer: int
    vocab: int
    eps: float
    in_block: int
    out_block: int
    head_block: int


class Scratch(NamedTuple):
    """x: residual stream; wide: what a projection reads, before quantisation; q*: the quantised activations (int16, and
    its int8 planes q = 256 * high + low; `low` alone in profile fast), their scales and sums a block; proj: in_proj's
    output; xbc: the convolution's; bad: first layer of a row that gave an Inf or a NaN, or -1.
    """

    x: np.ndarray
    wide: np.ndarray
    q: np.ndarray
    high: np.ndarray
    low: np.ndarray
    q_scale: np.ndarray
    q_sum: np.ndarray
    proj: np.ndarray
    xbc: np.ndarray
    bad: np.ndarray


def dims_of(c: Mamba2Config, in_block: int, out_block: int, head_block: int) -> Dims:
    return Dims(
        c.d_model, c.d_inner, c.conv_dim, c.d_in_proj, c.n_heads, c.headdim, c.d_state, c.n_groups, c.d_conv, c.n_layer,
        c.vocab_size, float(np.float32(c.rms_eps)), in_block, out_block, head_block,
    )  # fmt: skip


def activations(rows: int, k: int) -> dict[str, np.ndarray]:
    """The arrays of a Scratch that a product reads: rows of up to k values, and what quantising them gives."""
    # 64 more than needed: rows a power of two apart would compete for the same cache sets
    width = -(-k // 64) * 64 + 64
    sixteens = -(-rows // 16) * 16  # AMX reads the planes of 16 rows at a time
    return {
        "wide": np.zeros((rows, width), np.float32),
        "q": np.zeros((rows, width), np.int16),
        "high": np.zeros((sixteens, width), np.int8),
        "low": np.zeros((sixteens, width), np.int8),
        "q_scale": np.zeros((rows, -(-width // 32)), np.float32),
        "q_sum": np.zeros((rows, -(-width // 32)), np.int32),
    }


def allocate(rows: int, c: Mamba2Config) -> Scratch:
    return Scratch(
        x=np.zeros((rows, c.d_model), np.float32),
        **activations(rows, max(c.d_model, c.d_inner)),
        proj=np.zeros((rows, -(-c.d_in_proj // 16) * 16), np.float32),
        xbc=np.zeros((rows, c.conv_dim), np.float32),
        bad=np.full(rows, -1, np.int64),
    )
