"""Quantisation of activations, and the matrix products: one overload a packed type.

Every product writes out[r, n] (+)= sum over blocks, ascending, of float(isum) * (weight scale * activation scale).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numba.extending import overload

from runtime_ref.kernels.intrinsics import bits_float, float_bits, half_to_float
from runtime_ref.kernels.math import MAGIC, MAGIC_BITS
from runtime_ref.kernels.pack import PackedFloat, PackedHalf, PackedQ4, PackedQ8, PackedTernary
from runtime_ref.kernels.profiles import Exact

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

TINY_BITS = np.int32(0x0D800000)  # 2**-100
INFINITE_BITS = np.int32(0x7F800000)
ABS_BITS = np.int32(0x7FFFFFFF)
NAN = np.float32(np.nan)
ZERO = np.float32(0.0)


@njit
def quantize_row(levels, s, r, k, block):
    """Row r of s.wide [k] into s.q, s.high, s.low, s.q_scale, s.q_sum (`reference.quantize`)."""
    for b in range(k // block):
        first = b * block
        largest = np.int32(0)
        for i in range(block):
            bits = np.int32(float_bits(s.wide[r, first + i]) & ABS_BITS)
            largest = max(largest, bits)
        if largest >= INFINITE_BITS or largest < TINY_BITS:
            s.q[r, first : first + block] = 0
            s.high[r, first : first + block] = 0
            s.low[r, first : first + block] = 0
            s.q_scale[r, b] = NAN if largest >= INFINITE_BITS else ZERO
            s.q_sum[r, b] = 0
            continue
        amax = bits_float(largest)
        inverse = levels / amax
        total = np.int32(0)
        for i in range(block):
            q = np.int32(float_bits(s.wide[r, first + i] * inverse + MAGIC) - MAGIC_BITS)
            high = np.int32((q + np.int32(128)) >> np.int32(8))
            s.q[r, first + i] = q
            s.high[r, first + i] = high
            s.low[r, first + i] = np.int32(q - np.int32(high << np.int32(8)))
            total = np.int32(total + q)
        s.q_scale[r, b] = amax / levels
        s.q_sum[r, b] = total


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
    return {
        PackedTernary: _ternary_exact if profile.instance_class is Exact else _ternary_fast,
        PackedQ8: _q8,
        PackedQ4: _q4,
        PackedHalf: _half,
        PackedFloat: _float,
    }[packed.instance_class]


def _ternary_body(planes):
    def body(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
        codes, scales = packed.codes[layer], packed.scales[layer]
        tiles, groups = codes.shape[0], scales.shape[1]
        per_group = k // groups // block
        y = np.empty(16, np.float32)
        isum = np.empty(16, np.int32)
        for r in range(rows):
            for tile in range(tid * tiles // threads, (tid + 1) * tiles // threads):
                y[:] = ZERO
                for b in range(k // block):
                    isum[:] = np.int32(0)
                    for step in range(b * block // 16, (b + 1) * block // 16):
                        for i in range(4):
                            for j in range(4):
                                q = np.int32(s.q[r, step * 16 + 4 * i + j])
                                for row in range(16):
                                    code = np.int32((codes[tile, step, row, j] >> np.uint8(2 * i)) & np.uint8(3))
                                    isum[row] += np.int32(code * q)
                    for row in range(16):
                        scale = half_to_float(scales[tile, b // per_group, row]) * s.q_scale[r, b]
                        y[row] += np.float32(np.int32(isum[row] - s.q_sum[r, b])) * scale
                _store(out, r, tile, y, add)

    return body


_ternary_exact = _ternary_body(2)
_ternary_fast = _ternary_body(1)


@njit
def _store(out, r, tile, y, add):
    for row in range(min(16, out.shape[1] - tile * 16)):
        out[r, tile * 16 + row] = out[r, tile * 16 + row] + y[row] if add else y[row]


def _q8(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    codes, scales = packed.codes[layer], packed.scales[layer]
    tiles = codes.shape[0]
    y = np.empty(16, np.float32)
    isum = np.empty(16, np.int32)
    for r in range(rows):
        for tile in range(tid * tiles // threads, (tid + 1) * tiles // threads):
            y[:] = ZERO
            for b in range(k // 32):
                isum[:] = np.int32(0)
                for step in range(b * 8, (b + 1) * 8):
                    for j in range(4):
                        column = (j & 1) * 2 + (j >> 1)
                        q = np.int32(s.q[r, step * 4 + column])
                        for row in range(16):
                            isum[row] += np.int32(np.int32(codes[tile, step, row, j]) * q)
                for row in range(16):
                    scale = half_to_float(scales[tile, b, row]) * s.q_scale[r, b]
                    y[row] += np.float32(isum[row]) * scale
            _store(out, r, tile, y, add)


def _q4(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    codes, scales = packed.codes[layer], packed.scales[layer]
    tiles = codes.shape[0]
    y = np.empty(16, np.float32)
    isum = np.empty(16, np.int32)
    for r in range(rows):
        for tile in range(tid * tiles // threads, (tid + 1) * tiles // threads):
            y[:] = ZERO
            for b in range(k // 32):
                isum[:] = np.int32(0)
                for step in range(b * 4, (b + 1) * 4):
                    for j in range(4):
                        for nibble in range(2):
                            column = 2 * (2 * (j & 1) + nibble) + (j >> 1)
                            q = np.int32(s.q[r, step * 8 + column])
                            for row in range(16):
                                code = np.int32((codes[tile, step, row, j] >> np.uint8(4 * nibble)) & np.uint8(15))
                                isum[row] += np.int32((code - np.int32(8)) * q)
                for row in range(16):
                    scale = half_to_float(scales[tile, b, row]) * s.q_scale[r, b]
                    y[row] += np.float32(isum[row]) * scale
            _store(out, r, tile, y, add)


@njit
def tree16(lanes):
    """The fixed tree over 16 lanes: 8, 4, 2, 1."""
    for i in range(8):
        lanes[i] = lanes[i] + lanes[i + 8]
    for i in range(4):
        lanes[i] = lanes[i] + lanes[i + 4]
    for i in range(2):
        lanes[i] = lanes[i] + lanes[i + 2]
    return lanes[0] + lanes[1]


def _half(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    values = packed.values[layer]
    n = values.shape[0]
    lanes = np.empty(16, np.float32)
    for r in range(rows):
        for row in range(tid * n // threads, (tid + 1) * n // threads):
            lanes[:] = ZERO
            for start in range(0, values.shape[1], 16):
                for i in range(16):
                    lanes[i] += half_to_float(values[row, start + i]) * s.wide[r, start + i]
            y = tree16(lanes)
            out[r, row] = out[r, row] + y if add else y


def _float(isa, profile, packed, layer, s, rows, k, block, out, add, tid, threads):
    values = packed.values[layer]
    n = values.shape[0]
    lanes = np.empty(16, np.float32)
    for r in range(rows):
        for row in range(tid * n // threads, (tid + 1) * n // threads):
            lanes[:] = ZERO
            for start in range(0, values.shape[1], 16):
                for i in range(16):
                    lanes[i] += values[row, start + i] * s.wide[r, start + i]
            y = tree16(lanes)
            out[r, row] = out[r, row] + y if add else y


def embed(packed, token, out):
    """Row `token` of an embedding matrix in fp32."""


@overload(embed)
def _embed(packed, token, out):
    return {PackedQ8: _embed_q8, PackedQ4: _embed_q4, PackedHalf: _embed_half, PackedFloat: _embed_float}[
        packed.instance_class
    ]


def _embed_q8(packed, token, out):
    tile, row = token // 16, token % 16
    for i in range(out.shape[0]):
        j = i & 3
        code = packed.codes[0, tile, i >> 2, row, (j & 1) * 2 + (j >> 1)]
        out[i] = np.float32(code) * half_to_float(packed.scales[0, tile, i >> 5, row])


def _embed_q4(packed, token, out):
    tile, row = token // 16, token % 16
    for i in range(out.shape[0]):
        pair, upper = (i & 7) >> 1, i & 1
        byte = packed.codes[0, tile, i >> 3, row, 2 * upper + (pair >> 1)]
        code = np.int32((byte >> np.uint8(4 * (pair & 1))) & np.uint8(15)) - 8
        out[i] = np.float32(code) * half_to_float(packed.scales[0, tile, i >> 5, row])


def _embed_half(packed, token, out):
    for i in range(out.shape[0]):
        out[i] = half_to_float(packed.values[0, token, i])


def _embed_float(packed, token, out):
    for i in range(out.shape[0]):
        out[i] = packed.values[0, token, i]
