"""Quantisation of activations, and what runs a product or an embedding row of each packed type (a file a type).

Every product writes out[r, n] (+)= sum over blocks, ascending, of float(isum) * (weight scale * activation scale).
"""

from __future__ import annotations

import numpy as np

from runtime_ref.kernels.compiled import kernel, overload
from runtime_ref.kernels.intrinsics import bits_float
from runtime_ref.kernels.kinds import EMBEDDINGS, PRODUCTS, UNQUANTISED
from runtime_ref.kernels.math import MAGIC, MAGIC_BITS, NO_BITS, ZERO, largest_bits
from runtime_ref.kernels.vector import (
    bits,
    load,
    shift_left,
    shift_right,
    splat,
    store,
    tree_sum,
)

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

TINY_BITS = np.int32(0x0D800000)  # 2**-100
INFINITE_BITS = np.int32(0x7F800000)
NAN = np.float32(np.nan)
EIGHT, ROUND = np.int32(8), np.int32(128)


@kernel
def quantize_row(levels, s, r, k, block):
    """Row r of s.wide [k] into s.q, s.high, s.low, s.q_scale, s.q_sum (`reference.quantize`)."""
    quantize_blocks(levels, s, r, 0, k // block, block)


@kernel
def quantize_blocks(levels, s, r, low, end, block):
    """`quantize_row` of the blocks low..end."""
    wide, q_row, high_row, low_row = s.wide[r], s.q[r], s.high[r], s.low[r]
    for b in range(low, end):
        first = b * block
        amax_bits = largest_bits(wide, first, first + block)
        inverse, scale = ZERO, ZERO
        if amax_bits >= INFINITE_BITS:
            scale = NAN
        elif amax_bits >= TINY_BITS:
            amax = bits_float(amax_bits)
            inverse = levels / amax
            scale = amax / levels
        total = splat(NO_BITS)
        for i in range(first, first + block, 16):
            q = bits(load(wide, i) * splat(inverse) + splat(MAGIC)) - splat(MAGIC_BITS)
            if amax_bits >= INFINITE_BITS:
                q = splat(NO_BITS)
            high = shift_right(q + splat(ROUND), splat(EIGHT))
            store(q_row, i, q)
            store(high_row, i, high)
            store(low_row, i, q - shift_left(high, splat(EIGHT)))
            total = total + q
        s.q_scale[r, b] = scale
        s.q_sum[r, b] = tree_sum(total)


def prepare(activations, packed, s, r, k, block):
    """What `multiply` reads of row r: the quantised activations, or nothing for a float matrix."""


@overload(prepare)
def _prepare(activations, packed, s, r, k, block):
    if packed.instance_class in UNQUANTISED:
        return lambda activations, packed, s, r, k, block: None
    return lambda activations, packed, s, r, k, block: quantize_row(activations.levels, s, r, k, block)


def multiply(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
    """out[r, :n] = (out[r, :n] if add else 0) + packed times the prepared row r; thread tid's share of the output rows."""


def multiply_few(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
    """`multiply` without what pays for many tokens only, which takes longer to compile than to run once."""


def _dispatch(name, many: bool) -> None:
    @overload(name)
    def choose(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        return PRODUCTS[packed.instance_class](isa.instance_class, activations.instance_class, many)


_dispatch(multiply, True)
_dispatch(multiply_few, False)


def embed(packed, token, out):
    """Row `token` of an embedding matrix in fp32."""


@overload(embed)
def _embed(packed, token, out):
    return EMBEDDINGS[packed.instance_class]
