"""Quantisation of activations, and the matrix products: one overload a packed type.

Every product writes out[r, n] (+)= sum over blocks, ascending, of float(isum) * (weight scale * activation scale).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from runtime_ref.kernels.amx import by_amx
from runtime_ref.kernels.block_tiles import q4_tile, q8_tile, together
from runtime_ref.kernels.intrinsics import bits_float, half_to_float
from runtime_ref.kernels.isa import PRIMITIVES
from runtime_ref.kernels.math import MAGIC, MAGIC_BITS, ZERO
from runtime_ref.kernels.pack import PackedFloat, PackedHalf, PackedQ4, PackedQ8, PackedTernary
from runtime_ref.kernels.tables import by_tables
from runtime_ref.kernels.tiles import PLANES, dense_tile, ternary_tile
from runtime_ref.kernels.vector import (
    address,
    bits,
    both,
    larger,
    largest,
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
ABS_BITS = np.int32(0x7FFFFFFF)
NAN = np.float32(np.nan)
NO_BITS, EIGHT, ROUND = np.int32(0), np.int32(8), np.int32(128)


@njit
def quantize_row(levels, s, r, k, block):
    """Row r of s.wide [k] into s.q, s.high, s.low, s.q_scale, s.q_sum (`reference.quantize`)."""
    wide, q_row, high_row, low_row = s.wide[r], s.q[r], s.high[r], s.low[r]
    for b in range(k // block):
        first = b * block
        top = splat(NO_BITS)
        for i in range(first, first + block, 16):
            top = larger(top, both(bits(load(wide, i)), splat(ABS_BITS)))
        amax_bits = largest(top)
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


def prepare(profile, packed, s, r, k, block):
    """What `multiply` reads of row r: the quantised activations, or nothing for a float matrix."""


@overload(prepare)
def _prepare(profile, packed, s, r, k, block):
    if packed.instance_class in (PackedHalf, PackedFloat):
        return lambda profile, packed, s, r, k, block: None
    return lambda profile, packed, s, r, k, block: quantize_row(profile.levels, s, r, k, block)


def multiply(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    """out[r, :n] = (out[r, :n] if add else 0) + packed[layer] times the prepared row r; thread tid's share of tiles."""


@overload(multiply)
def _multiply(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    primitives = PRIMITIVES[isa.instance_class]
    return {
        PackedTernary: lambda: _ternary(primitives.bytes.in_flight // PLANES[profile.instance_class]),
        PackedQ8: lambda: _blocks(q8_tile, together(isa.instance_class, profile.instance_class, 8)),
        PackedQ4: lambda: _blocks(q4_tile, together(isa.instance_class, profile.instance_class, 4)),
        PackedHalf: lambda: _dense,
        PackedFloat: lambda: _dense,
    }[packed.instance_class]()


@njit
def _store(out, r, tile, y, t, add):
    """Row t of y [.., 16] to where tile `tile` of output row r is."""
    first = tile * 16
    for row in range(min(16, out.shape[1] - first)):
        out[r, first + row] = out[r, first + row] + y[t, row] if add else y[t, row]


def _ternary(together):
    def body(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
        codes, scales = packed.codes[layer], packed.scales[layer]
        tiles, groups = codes.shape[0], scales.shape[1]
        per_group, steps = k // groups // block, block // 16
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        high, low, q_scale, q_sum = address(s.high), address(s.low), address(s.q_scale), address(s.q_sum)
        y = np.empty((together, 16), np.float32)
        y_at = address(y)
        first, end = tid * tiles // threads, (tid + 1) * tiles // threads
        done = by_amx(isa, profile, codes, scales, s, rows, k, block, out, add, first, end)
        if done == 0:
            done = by_tables(isa, profile, codes, scales, s, rows, k, block, out, add, first, end)
        for tile in range(first, end):
            codes_at, scales_at = address(codes[tile]), address(scales[tile])
            r = done
            while r + together <= rows:
                ternary_tile(
                    isa, profile, together, codes_at, scales_at, high + r * q_stride, low + r * q_stride, q_stride,
                    q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, groups, per_group, steps, y_at,
                )  # fmt: skip
                for t in range(together):
                    _store(out, r + t, tile, y, t, add)
                r += together
            while r < rows:
                ternary_tile(
                    isa, profile, 1, codes_at, scales_at, high + r * q_stride, low + r * q_stride, q_stride,
                    q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, groups, per_group, steps, y_at,
                )  # fmt: skip
                _store(out, r, tile, y, 0, add)
                r += 1

    return body


def _blocks(kernel, together):
    def body(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
        codes, scales = packed.codes[layer], packed.scales[layer]
        tiles, blocks = codes.shape[0], scales.shape[1]
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        q, high, low = address(s.q), address(s.high), address(s.low)
        q_scale, q_sum = address(s.q_scale), address(s.q_sum)
        y = np.empty((together, 16), np.float32)
        y_at = address(y)
        for tile in range(tid * tiles // threads, (tid + 1) * tiles // threads):
            codes_at, scales_at = address(codes[tile]), address(scales[tile])
            r = 0
            while r + together <= rows:
                kernel(
                    isa, profile, together, codes_at, scales_at, q + 2 * r * q_stride, high + r * q_stride, low + r * q_stride,
                    q_stride, q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, blocks, y_at,
                )  # fmt: skip
                for t in range(together):
                    _store(out, r + t, tile, y, t, add)
                r += together
            while r < rows:
                kernel(
                    isa, profile, 1, codes_at, scales_at, q + 2 * r * q_stride, high + r * q_stride, low + r * q_stride,
                    q_stride, q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, blocks, y_at,
                )  # fmt: skip
                _store(out, r, tile, y, 0, add)
                r += 1

    return body


def _dense(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    values = packed.values[layer]
    n, steps = values.shape[0], values.shape[1] // 16
    row_bytes, x_stride, x = values.strides[0], s.wide.strides[0], address(s.wide)
    y = np.empty((2, 16), np.float32)
    y_at = address(y)
    quads = (n + 3) // 4
    for quad in range(tid * quads // threads, (tid + 1) * quads // threads):
        first = quad * 4
        w = address(values) + first * row_bytes
        whole = first + 4 <= n
        for r in range(0, rows, 2):
            two = r + 2 <= rows
            if whole and two:
                dense_tile(packed, 4, 2, w, row_bytes, x + r * x_stride, x_stride, steps, y_at)
            elif whole:
                dense_tile(packed, 4, 1, w, row_bytes, x + r * x_stride, x_stride, steps, y_at)
            for t in range(2 if two else 1):
                for row in range(min(4, n - first)):
                    if not whole:
                        at = address(y) + 4 * (16 * t + row)
                        dense_tile(
                            packed, 1, 1, w + row * row_bytes, row_bytes, x + (r + t) * x_stride, x_stride, steps, at
                        )
                    value = y[t, row]
                    out[r + t, first + row] = out[r + t, first + row] + value if add else value


def embed(packed, token, out):
    """Row `token` of an embedding matrix in fp32."""


@overload(embed)
def _embed(packed, token, out):
    return {
        PackedTernary: _embed_ternary,
        PackedQ8: _embed_q8,
        PackedQ4: _embed_q4,
        PackedHalf: _embed_half,
        PackedFloat: _embed_float,
    }[packed.instance_class]


def _embed_ternary(packed, token, out):
    tile, row = token // 16, token % 16
    group = out.shape[0] // packed.scales.shape[2]
    for i in range(out.shape[0]):
        byte = packed.codes[0, tile, i >> 4, row, i & 3]
        code = np.int32((byte >> np.uint8(2 * ((i & 15) >> 2))) & np.uint8(3)) - 1
        out[i] = np.float32(code) * half_to_float(packed.scales[0, tile, i // group, row])


def _embed_q8(packed, token, out):
    tile, row = token // 16, token % 16
    for i in range(out.shape[0]):
        code = packed.codes[0, tile, i >> 2, row, i & 3]
        out[i] = np.float32(code) * half_to_float(packed.scales[0, tile, i >> 5, row])


def _embed_q4(packed, token, out):
    tile, row = token // 16, token % 16
    for i in range(out.shape[0]):
        byte = packed.codes[0, tile, i >> 3, row, i & 3]
        code = np.int32((byte >> np.uint8(i & 4)) & np.uint8(15)) - 8
        out[i] = np.float32(code) * half_to_float(packed.scales[0, tile, i >> 5, row])


def _embed_half(packed, token, out):
    for i in range(out.shape[0]):
        out[i] = half_to_float(packed.values[0, token, i])


def _embed_float(packed, token, out):
    for i in range(out.shape[0]):
        out[i] = packed.values[0, token, i]
