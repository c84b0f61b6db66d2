"""The ternary product of many tokens by AMX, the unit of Intel's servers that multiplies matrices of bytes.

One instruction multiplies 16 tokens by 16 rows of weights over 64 columns. A step of PackedTernary has the order that the
unit wants of its second matrix: a dword of four columns, 16 rows side by side. Its fields are spread to bytes of -1, 0 and 1
once for all tokens; the activations are read as they lie, in profile exact as two planes with sums of their own.

The integers are those of `tiles.ternary_tile` and meet the scales in the same order, so the results are the same bits.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.kernels.compiled import overload
from runtime_ref.kernels.isa import PRIMITIVES, constant
from runtime_ref.kernels.output import put_row
from runtime_ref.kernels.tiles import F32, HALF, I8, I16, I32, I64, PLANES, ROWS, Code
from runtime_ref.kernels.vector import address, ask_for, ask_for_line, poke, splat, splatted

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

TILE = 1024  # bytes: 16 rows of 64
TOKENS = 16  # a tile's
SUMS = 4  # tiles that add up at the same time; 0..3 hold sums, the others what is multiplied
FEWEST_ROWS = 4  # fewer tokens leave most of a tile idle
V: TypeAlias = ir.Value


def unit(code: Code, name: str, *args: V | int) -> None:
    """An instruction of the unit; a plain number is a tile's."""
    values = [ir.Constant(I8, a) if isinstance(a, int) else a for a in args]
    kind = ir.FunctionType(ir.VoidType(), [v.type for v in values])
    name = f"llvm.x86.{name}"
    code.b.call(code.b.module.globals.get(name) or ir.Function(code.b.module, kind, name), values)


def _planes(profile) -> int:
    return PLANES[profile.instance_class]


@intrinsic
def amx_begin(typingctx, columns, tokens, memory):
    """Shape the tiles: sums [tokens][16] int32, weights [columns / 4][16 rows][4], activations [tokens][columns]; from 64 bytes of memory."""

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        columns, tokens, memory = b.trunc(args[0], I16), b.trunc(args[1], I8), code.pointer(args[2])
        code.store(ir.Constant(ir.VectorType(I64, 8), None), memory, 8)
        code.store(ir.Constant(I8, 1), memory, 1)
        for tile in range(8):
            holds_activations = tile >= 6
            code.store(columns if holds_activations else ir.Constant(I16, 64), code.at(memory, 16 + 2 * tile), 2)
            quads = b.trunc(b.lshr(columns, ir.Constant(I16, 2)), I8)
            code.store(quads if tile in (4, 5) else tokens, code.at(memory, 48 + tile), 1)
        unit(code, "ldtilecfg", memory)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def amx_end(typingctx):
    def codegen(context, builder, sig, args):
        unit(Code(builder), "tilerelease")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _spread(typingctx, codes, steps, ahead, weights):
    """`steps` steps of a tile of PackedTernary as int8 [column / 4][16 rows][4]; asks for the codes `ahead` bytes further."""

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        codes_at, weights_at = code.pointer(args[0]), code.pointer(args[3])
        raw, nibbles = ir.VectorType(I8, 64), ir.VectorType(I32, 16)
        shuffle = ir.FunctionType(raw, [raw, raw])
        name = "llvm.x86.avx512.pshuf.b.512"
        pick = b.module.globals.get(name) or ir.Function(b.module, shuffle, name)
        tables = [ir.Constant(raw, [(i >> place & 3) - 1 for i in range(16)] * 4) for place in (0, 2)]

        def step(i, _):
            source, target = code.at(codes_at, b.mul(i, code.i64(64))), code.at(weights_at, b.mul(i, code.i64(256)))
            ask_for_line(b, code.at(source, args[2]), level=2)
            four = code.load(source, nibbles, 4)
            for half in range(2):
                low = b.and_(b.lshr(four, constant(I32, 16, 4 * half)), constant(I32, 16, 0x0F0F0F0F))
                for field, table in enumerate(tables):
                    value = b.call(pick, [table, b.bitcast(low, raw)])
                    code.store(value, code.at(target, 64 * (2 * half + field)), 64)
            return []

        code.loop(args[1], [], step)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _multiply(typingctx, profile, weights, stride, low, high, q_stride, columns, times, sums):
    """16 tokens times SUMS / planes tiles of weights: sums int32 [tile][plane][token][16 rows].

    weights: spread, `stride` bytes a tile of rows; low, high: the first token's planes, q_stride bytes a token; `times`
    times `columns` columns.
    """
    planes = _planes(profile)
    sig = types.void(profile, *[types.int64] * 8)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        weights_at, low_at, high_at, sums_at = (code.pointer(args[i]) for i in (1, 3, 4, 8))
        line = code.i64(64)
        for tile in range(SUMS):
            unit(code, "tilezero", tile)

        def part(i, _):
            column = b.mul(i, args[6])
            for plane, at in enumerate((low_at, high_at)[:planes]):
                unit(code, "tileloadd64", 7 - plane, code.at(at, column), args[5])
            for tile in range(SUMS // planes):
                own = b.add(b.mul(args[2], code.i64(tile)), b.mul(column, code.i64(ROWS)))
                unit(code, "tileloadd64", 4 + tile % 2, code.at(weights_at, own), line)
                for plane in range(planes):
                    unit(code, "tdpbssd", tile * planes + plane, 7 - plane, 4 + tile % 2)
            return []

        code.loop(args[7], [], part)
        for tile in range(SUMS):
            unit(code, "tilestored64", tile, code.at(sums_at, TILE * tile), line)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _scale(typingctx, profile, sums, scales, q_scale, b_stride, tokens, y):
    """y[token][16 rows] += float(sum) * (the row's scale * the token's), for one tile; q_scale b_stride elements a token."""
    planes = _planes(profile)
    sig = types.void(profile, *[types.int64] * 6)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        sums_at, scales_at, q_at, y_at = (code.pointer(args[i]) for i in (1, 2, 3, 6))
        floats, ints = ir.VectorType(F32, ROWS), ir.VectorType(I32, ROWS)
        scale = b.fpext(code.load(scales_at, ir.VectorType(HALF, ROWS), 2), floats)

        def token(t, _):
            place = b.mul(t, code.i64(64))
            source, target = code.at(sums_at, place), code.at(y_at, place)
            total = code.load(source, ints, 4)
            if planes == 2:
                upper = code.load(code.at(source, TILE), ints, 4)
                total = b.add(total, b.shl(upper, constant(I32, ROWS, 8)))
            own = splatted(b, code.load(code.at(q_at, b.mul(t, b.mul(args[4], code.i64(4)))), F32, 4), ROWS)
            product = b.fmul(b.sitofp(total, floats), b.fmul(scale, own))
            code.store(b.fadd(code.load(target, floats, 4), product), target)
            return []

        code.loop(args[5], [], token)
        return context.get_dummy_value()

    return sig, codegen


def by_amx(isa, profile, codes, scales, s, rows, k, block, out, add, first, end):
    """The product of the tiles first..end and all `rows`, or nothing; returns how many rows it was.

    codes, scales: of a PackedTernary. Writes what `matmul.multiply` says.
    """


@overload(by_amx, allocates=True)
def _by_amx(isa, profile, codes, scales, s, rows, k, block, out, add, first, end):
    if not PRIMITIVES[isa.instance_class].matrices:
        return lambda isa, profile, codes, scales, s, rows, k, block, out, add, first, end: 0
    planes = _planes(profile)
    together = SUMS // planes

    def body(isa, profile, codes, scales, s, rows, k, block, out, add, first, end):
        if rows < FEWEST_ROWS or block % 32 != 0:
            return 0
        columns = 64 if block % 64 == 0 else 32
        blocks, spread = k // block, block * ROWS
        per_group = blocks // scales.shape[1]
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        memory = np.empty(64 + (1 + SUMS) * TILE + together * (spread + 64 * rows), np.uint8)
        shape = (address(memory) + 63) // 64 * 64
        sums = shape + TILE
        weights = sums + SUMS * TILE
        # whole KB after the sums: a sum that is read never lies 4 KB beside a y just written
        y = weights + together * spread
        amx_begin(columns, min(TOKENS, rows), shape)
        for start in range(first, end, together):
            tiles = min(together, end - start)
            for row in range(tiles * rows):
                poke(y + 64 * row, splat(np.float32(0.0)))
            for r in range(rows):  # the states that passed since have taken these out of the caches
                for tile in range(tiles):
                    ask_for(address(out) + r * out.strides[0] + 64 * (start + tile))
            for i in range(blocks):
                for tile in range(tiles):
                    at = address(codes) + (start + tile) * codes.strides[0] + i * (block // 16) * codes.strides[1]
                    _spread(at, block // 16, together * codes.strides[0], weights + tile * spread)
                for r in range(0, rows, TOKENS):
                    q = r * q_stride + i * block
                    _multiply(
                        profile, weights, spread, address(s.low) + q, address(s.high) + q, q_stride, columns,
                        block // columns, sums,
                    )  # fmt: skip
                    q_scale = address(s.q_scale) + 4 * (r * b_stride + i)
                    for tile in range(tiles):
                        of_tile = (
                            address(scales) + (start + tile) * scales.strides[0] + i // per_group * scales.strides[1]
                        )
                        y_at = y + 64 * (tile * rows + r)
                        _scale(
                            profile,
                            sums + tile * planes * TILE,
                            of_tile,
                            q_scale,
                            b_stride,
                            min(TOKENS, rows - r),
                            y_at,
                        )
            for tile in range(tiles):
                for r in range(rows):
                    put_row(out, r, start + tile, y + 64 * (tile * rows + r), add)
        amx_end()
        return rows + 0 * memory[0]  # Numba frees an array after its last mention

    return body
