"""Products with values rounded in blocks of 32, Q8_0 and Q4_0 (`reference.blocks`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime_ref.kernels.amx_blocks import blocks_by_amx
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.block_tiles import q4_tile, q8_tile, together
from runtime_ref.kernels.compiled import kernel, stack
from runtime_ref.kernels.intrinsics import half_to_float
from runtime_ref.kernels.output import put_row
from runtime_ref.kernels.packed.blocks import PackedQ4, PackedQ8
from runtime_ref.kernels.vector import address

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba


def q8_product(isa_class: type, activations_class: type, many: bool) -> Callable[..., None]:
    """`matmul.multiply` for a PackedQ8."""
    return _product(8, q8_tile, together(isa_class, activations_class, 8), many)


def q4_product(isa_class: type, activations_class: type, many: bool) -> Callable[..., None]:
    """`matmul.multiply` for a PackedQ4."""
    return _product(4, q4_tile, together(isa_class, activations_class, 4), many)


def _product(bits: int, multiply_tile: Any, in_flight: int, many: bool) -> Callable[..., None]:
    room = 64 * in_flight

    def tiles_of_rows(isa, activations, packed, s, rows, out, add, first, end):
        codes, scales = packed.codes, packed.scales
        blocks = scales.shape[1]
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        q, high, low, q_scale, q_sum = (
            address(s.q),
            address(s.high),
            address(s.low),
            address(s.q_scale),
            address(s.q_sum),
        )
        y = stack(room)
        for tile in range(first, end):
            codes_at, scales_at = address(codes[tile]), address(scales[tile])
            r = 0
            while r + in_flight <= rows:
                multiply_tile(
                    isa, activations, in_flight, codes_at, scales_at, q + 2 * r * q_stride, high + r * q_stride, low + r * q_stride,
                    q_stride, q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, blocks, y,
                )  # fmt: skip
                for t in range(in_flight):
                    put_row(out, r + t, tile, y + 64 * t, add)
                r += in_flight
            while r < rows:
                multiply_tile(
                    isa, activations, 1, codes_at, scales_at, q + 2 * r * q_stride, high + r * q_stride, low + r * q_stride,
                    q_stride, q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, blocks, y,
                )  # fmt: skip
                put_row(out, r, tile, y, add)
                r += 1

    by_tiles = kernel(tiles_of_rows)

    def for_few(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        first, end = share(packed.codes.shape[0], tid, threads)
        by_tiles(isa, activations, packed, s, rows, out, add, first, end)

    def for_many(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        first, end = share(packed.codes.shape[0], tid, threads)
        if blocks_by_amx(isa, activations, bits, packed.codes, packed.scales, s, rows, out, add, first, end) == 0:
            by_tiles(isa, activations, packed, s, rows, out, add, first, end)

    return for_many if many else for_few


def embed_q8(packed, token, out):
    tile, row = token // 16, token % 16
    for i in range(out.shape[0]):
        code = packed.codes[tile, i >> 2, row, i & 3]
        out[i] = np.float32(code) * half_to_float(packed.scales[tile, i >> 5, row])


def embed_q4(packed, token, out):
    tile, row = token // 16, token % 16
    for i in range(out.shape[0]):
        byte = packed.codes[tile, i >> 3, row, i & 3]
        code = np.int32((byte >> np.uint8(i & 4)) & np.uint8(15)) - 8
        out[i] = np.float32(code) * half_to_float(packed.scales[tile, i >> 5, row])


PRODUCTS = {PackedQ8: q8_product, PackedQ4: q4_product}
EMBEDDINGS = {PackedQ8: embed_q8, PackedQ4: embed_q4}
UNQUANTISED = ()
