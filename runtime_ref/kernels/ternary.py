"""Products with codes -1, 0, 1 and a scale a group (`reference.ternary`): binary weights too, which have no zeros."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime_ref.kernels.amx import by_amx
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import kernel, stack
from runtime_ref.kernels.intrinsics import half_to_float
from runtime_ref.kernels.isa import PRIMITIVES
from runtime_ref.kernels.output import put_row
from runtime_ref.kernels.packed.ternary import PackedTernary
from runtime_ref.kernels.tables import by_tables
from runtime_ref.kernels.tiles import PLANES, ternary_tile
from runtime_ref.kernels.vector import address

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba


def product(isa_class: type, activations_class: type, many: bool) -> Callable[..., None]:
    """`matmul.multiply` for a PackedTernary; `many`: with the ways that pay for many tokens only."""
    together = PRIMITIVES[isa_class].bytes.in_flight // PLANES[activations_class]
    room = 64 * together

    def tiles_of_rows(isa, activations, packed, s, rows, k, block, out, add, first, end, done):
        """Output rows of the tiles first..end, for the tokens done..rows."""
        codes, scales = packed.codes, packed.scales
        groups = scales.shape[1]
        per_group, steps = k // groups // block, block // 16
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        high, low, q_scale, q_sum = address(s.high), address(s.low), address(s.q_scale), address(s.q_sum)
        y = stack(room)
        for tile in range(first, end):
            codes_at, scales_at = address(codes[tile]), address(scales[tile])
            r = done
            while r + together <= rows:
                ternary_tile(
                    isa, activations, together, codes_at, scales_at, high + r * q_stride, low + r * q_stride, q_stride,
                    q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, groups, per_group, steps, y,
                )  # fmt: skip
                for t in range(together):
                    put_row(out, r + t, tile, y + 64 * t, add)
                r += together
            while r < rows:
                ternary_tile(
                    isa, activations, 1, codes_at, scales_at, high + r * q_stride, low + r * q_stride, q_stride,
                    q_scale + r * b_stride * 4, q_sum + r * b_stride * 4, b_stride, groups, per_group, steps, y,
                )  # fmt: skip
                put_row(out, r, tile, y, add)
                r += 1

    by_tiles = kernel(tiles_of_rows)

    def for_few(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        first, end = share(packed.codes.shape[0], tid, threads)
        by_tiles(isa, activations, packed, s, rows, k, block, out, add, first, end, 0)

    def for_many(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        first, end = share(packed.codes.shape[0], tid, threads)
        codes, scales = packed.codes, packed.scales
        done = by_amx(isa, activations, codes, scales, s, rows, k, block, out, add, first, end)
        if done == 0:
            done = by_tables(isa, activations, codes, scales, s, rows, k, block, out, add, first, end)
        if done < rows:
            by_tiles(isa, activations, packed, s, rows, k, block, out, add, first, end, done)

    return for_many if many else for_few


def embed(packed, token, out):
    tile, row = token // 16, token % 16
    group = out.shape[0] // packed.scales.shape[1]
    for i in range(out.shape[0]):
        byte = packed.codes[tile, i >> 4, row, i & 3]
        code = np.int32((byte >> np.uint8(2 * ((i & 15) >> 2))) & np.uint8(3)) - 1
        out[i] = np.float32(code) * half_to_float(packed.scales[tile, i // group, row])


PRODUCTS, EMBEDDINGS = {PackedTernary: product}, {PackedTernary: embed}
UNQUANTISED = ()
