"""The product of many tokens with Q8_0 and Q4_0 by AMX (`amx.py` has ternary's).

A block is half a tile, 32 columns, and its integers meet the scales at once: for 16 tokens and 16 rows all blocks of the row are
taken one after another, with the 16 x 16 results in registers. The integers are those of `block_tiles`, in the same order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.kernels.amx import TILE, TOKENS, amx_begin, amx_end, unit
from runtime_ref.kernels.compiled import overload
from runtime_ref.kernels.isa import PRIMITIVES, constant
from runtime_ref.kernels.output import put_row
from runtime_ref.kernels.tiles import F32, I8, I32, PLANES, ROWS, Code, scale_vectors, zeros
from runtime_ref.kernels.vector import address, ask_for_line, splatted

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

BLOCK = 32
BYTES = BLOCK * ROWS  # of a block of 16 rows as int8
SPARE = 4  # places for a block's sums
FEW = 8  # tokens for which half a tile is shaped
FEWEST_ROWS = 4  # fewer leave most of that idle too
AHEAD = 2  # blocks whose sums are made before they are read: what the unit stores is not at hand at once
FURTHER = 8192  # bytes of codes to ask for in advance


@intrinsic
def _spread(typingctx, codes, words, weights):
    """`words` dwords of a tile of PackedQ4 as int8 [column / 4][16 rows][4]."""

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        codes_at, weights_at = code.pointer(args[0]), code.pointer(args[2])
        raw = ir.VectorType(I8, 64)

        def word(i, _):
            source, target = code.at(codes_at, b.mul(i, code.i64(64))), code.at(weights_at, b.mul(i, code.i64(128)))
            ask_for_line(b, code.at(source, BYTES), level=2)
            eight = code.load(source, ir.VectorType(I32, ROWS), 4)
            for half in range(2):
                nibbles = b.and_(b.lshr(eight, constant(I32, 16, 4 * half)), constant(I32, 16, 0x0F0F0F0F))
                code.store(b.sub(b.bitcast(nibbles, raw), constant(I8, 64, 8)), code.at(target, 64 * half), 64)
            return []

        code.loop(args[1], [], word)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic(prefer_literal=True)
def _multiply(
    typingctx, profile, tokens, weights, scales, low, high, q_stride, q_scale, b_stride, blocks, sums, y, ahead
):
    """`tokens` (literal) tokens times 16 rows: y fp32 [token][16 rows].

    weights: int8 [column / 4][16 rows][4]; scales: of these rows; low, high: the first token's planes, q_stride bytes a token; q_scale:
    b_stride elements a token; sums: room for SPARE times the planes' sums; ahead: how many bytes further to ask for weights.
    """
    if not isinstance(tokens, types.IntegerLiteral):
        return None
    planes, count = PLANES[profile.instance_class], tokens.literal_value
    sig = types.void(profile, tokens, *[types.int64] * 11)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        args = args[1:]
        weights_at, scales_at, low_at, high_at, q_at, sums_at, y_at = (
            code.pointer(args[i]) for i in (1, 2, 3, 4, 6, 9, 10)
        )
        line, floats, ints = code.i64(64), ir.VectorType(F32, ROWS), ir.VectorType(I32, ROWS)
        tokens = [code.at(q_at, b.mul(args[7], code.i64(4 * t))) for t in range(count)]

        def place(i):
            return code.at(sums_at, b.mul(b.and_(i, code.i64(SPARE - 1)), code.i64(planes * TILE)))

        def add_up(i, _):
            column = b.mul(i, code.i64(BLOCK))
            own = code.at(weights_at, b.mul(i, code.i64(BYTES)))
            for at in range(0, BYTES, 64):
                ask_for_line(b, code.at(own, b.add(args[11], code.i64(at))), level=2)
            unit(code, "tileloadd64", 4, own, line)
            for plane, at in enumerate((low_at, high_at)[:planes]):
                unit(code, "tilezero", plane)
                unit(code, "tileloadd64", 7 - plane, code.at(at, column), args[5])
                unit(code, "tdpbssd", plane, 7 - plane, 4)
                unit(code, "tilestored64", plane, code.at(place(i), TILE * plane), line)
            return []

        def block(i, y):
            following = b.add(i, code.i64(AHEAD))
            with b.if_then(b.icmp_signed("<", following, args[8])):
                add_up(following, [])
            own_sums = place(i)
            (scale,) = scale_vectors(code, code.at(scales_at, b.mul(i, code.i64(2 * ROWS))), ROWS)
            result = []
            for t in range(count):
                total = code.load(code.at(own_sums, 64 * t), ints, 4)
                if planes == 2:
                    upper = code.load(code.at(own_sums, TILE + 64 * t), ints, 4)
                    total = b.add(total, b.shl(upper, constant(I32, ROWS, 8)))
                own = splatted(b, code.load(code.at(tokens[t], b.mul(i, code.i64(4))), F32, 4), ROWS)
                result.append(b.fadd(y[t], b.fmul(b.sitofp(total, floats), b.fmul(scale, own))))
            return result

        ahead = code.i64(AHEAD)
        code.loop(b.select(b.icmp_signed("<", args[8], ahead), args[8], ahead), [], add_up)
        for t, row in enumerate(code.loop(args[8], zeros(floats, count), block)):
            code.store(row, code.at(y_at, 64 * t))
        return context.get_dummy_value()

    return sig, codegen


def blocks_by_amx(isa, profile, bits, codes, scales, s, rows, out, add, first, end):
    """The product of the tiles first..end and all `rows`, or nothing; returns how many rows it was.

    codes, scales: of a PackedQ8 or PackedQ4, as `bits` (literal) says. Writes what `matmul.multiply` says.
    """


@overload(blocks_by_amx, allocates=True)
def _blocks_by_amx(isa, profile, bits, codes, scales, s, rows, out, add, first, end) -> Any:
    if not PRIMITIVES[isa.instance_class].matrices:
        return lambda isa, profile, bits, codes, scales, s, rows, out, add, first, end: 0
    results = SPARE * PLANES[profile.instance_class] * TILE
    weights_at = results + TILE

    def body(isa, profile, bits, codes, scales, s, rows, out, add, first, end):
        if rows < FEWEST_ROWS:
            return 0
        blocks = scales.shape[1]
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        low, high, q_scale = address(s.low), address(s.high), address(s.q_scale)
        memory = np.empty(128 + weights_at + (blocks * BYTES if bits == 4 else 0), np.uint8)
        shape = (address(memory) + 63) // 64 * 64
        sums = shape + 64
        few = rows <= FEW
        amx_begin(BLOCK, FEW if few else TOKENS, shape)
        for tile in range(first, end):
            weights = address(codes) + tile * codes.strides[0]
            if bits == 4:
                _spread(weights, blocks * 4, sums + weights_at)
                weights = sums + weights_at
            scales_at = address(scales) + tile * scales.strides[0]
            for r in range(0, rows, TOKENS):
                q, q_scale_at, ahead = r * q_stride, q_scale + 4 * r * b_stride, FURTHER if bits == 8 and r == 0 else 0
                if few:
                    _multiply(
                        profile, FEW, weights, scales_at, low + q, high + q, q_stride, q_scale_at, b_stride, blocks, sums,
                        sums + results, ahead,
                    )  # fmt: skip
                else:
                    _multiply(
                        profile, TOKENS, weights, scales_at, low + q, high + q, q_stride, q_scale_at, b_stride, blocks, sums,
                        sums + results, ahead,
                    )  # fmt: skip
                for t in range(min(TOKENS, rows - r)):
                    put_row(out, r + t, tile, sums + results + 64 * t, add)
        amx_end()
        return rows + 0 * memory[0]  # Numba frees an array after its last mention

    return body
