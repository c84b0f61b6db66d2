"""The ternary product of many tokens by tables of sums, without a multiplication: the method of the four Russians.

Four ternary weights have 81 values, so four columns of activations have 81 signed sums. A table holds them all, each a
vector with one token a lane; then a row of weights costs one load and one addition a table, for four columns and all the
tokens of the vector. Arlazarov, Dinic, Kronrod and Faradzev (1970) multiply Boolean matrices so.

The integers are those of `tiles.ternary_tile` and meet the scales in the same order, so the results are the same bits. A
vector of 256 bits holds 8 tokens in int32 in profile exact, 16 in int16 in profile fast, where 256 activations of at most 127
reach 32512; one of 512 bits twice as many. Eight tables, of 32 columns, take 20 or 40 KB and stay near while all rows of a
block pass.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.arithmetic import Int8, Int16
from runtime_ref.kernels.compiled import kernel, overload
from runtime_ref.kernels.isa import PRIMITIVES
from runtime_ref.kernels.tiles import F32, HALF, I8, I16, I32, I64, Code
from runtime_ref.kernels.vector import address, splatted

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ENTRIES = 81  # of a table, each a vector
TABLES, COLUMNS = 8, 32  # worked with at a time: one for each byte of two steps of PackedTernary, four columns a byte
SPARE = 40  # entries: no byte, not even one with the code that does not exist, points further past the last table
FEWEST_ROWS = 16  # with fewer tokens the tables' own cost is not made up for
FEWEST_TILES, MOST_TILES = 32, 128  # of 16 rows of weights: fewer do not pay for the tables, more would leave the cache
FLOATS = ir.VectorType(F32, 8)


def _vector(isa, profile) -> tuple[int, int, ir.VectorType]:
    """A vector's bytes, how many tokens it holds, and its type."""
    size, element = PRIMITIVES[isa.instance_class].tables, {Int16: I32, Int8: I16}[profile.instance_class]
    tokens = 8 * size // element.width
    return size, tokens, ir.VectorType(element, tokens)


@intrinsic
def _build(typingctx, isa, profile, x, tables):
    """The eight tables of 32 columns x [32][tokens]: table 4 s + j has the columns 16 s + j + 4 i, i the base-3 digit."""
    sig = types.void(isa, profile, types.int64, types.int64)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        size, _, kind = _vector(isa, profile)
        x_at, tables_at = code.pointer(args[2]), code.pointer(args[3])

        def sums(columns):
            found = [ir.Constant(kind, None)]
            for x in columns:  # the digits 0, 1, 2 stand for the weights -1, 0, 1
                found = [b.sub(s, x) for s in found] + found + [b.add(s, x) for s in found]
            return found

        def table(index, _):
            step, byte = b.udiv(index, code.i64(4)), b.urem(index, code.i64(4))
            first = code.at(x_at, b.mul(b.add(b.mul(step, code.i64(16)), byte), code.i64(size)))
            columns = [code.load(code.at(first, 4 * i * size), kind, 4) for i in range(4)]
            target = code.at(tables_at, b.mul(index, code.i64(ENTRIES * size)))
            lower, upper = sums(columns[:2]), sums(columns[2:])
            for i, high in enumerate(upper):
                for j, low in enumerate(lower):
                    code.store(b.add(high, low), code.at(target, (9 * i + j) * size), size)
            return []

        code.loop(code.i64(TABLES), [], table)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _offsets(typingctx, isa, codes, stride, tiles, slabs, offsets):
    """Where each row's entries lie in its tables: uint16 [slab][row][table] bytes, of `tiles` tiles `stride` bytes apart.

    codes: address of the first tile's first step; a slab is two steps, 32 columns.
    """
    sig = types.void(isa, *[types.int64] * 5)

    def codegen(context, builder, sig, args):
        code, b, args = Code(builder), builder, args[1:]
        codes_at, offsets_at = code.pointer(args[0]), code.pointer(args[4])
        of_tile = 16 * TABLES * 2
        of_slab = b.mul(args[2], code.i64(of_tile))
        raw, dwords, wide = ir.VectorType(I8, 32), ir.VectorType(I32, 8), ir.VectorType(I16, 32)
        shift = PRIMITIVES[isa.instance_class].tables.bit_length() - 1

        def of(value: int) -> ir.Constant:
            return ir.Constant(raw, [value] * 32)

        def base_three(x):
            """The four base-4 digits of each byte, read as base 3: a byte of d + 4 c + 16 b + 64 a to d + 3 c + 9 b + 27 a."""
            pairs = b.sub(x, b.and_(b.lshr(x, of(2)), of(0x33)))
            upper = b.and_(b.lshr(pairs, of(4)), of(15))
            return b.add(b.sub(pairs, b.shl(upper, of(3))), upper)

        def tile(t, _):
            source, target = code.at(codes_at, b.mul(t, args[1])), code.at(offsets_at, b.mul(t, code.i64(of_tile)))

            def slab(s, _):
                steps, rows = code.at(source, b.mul(s, code.i64(128))), code.at(target, b.mul(s, of_slab))
                for half in range(2):  # 8 rows of each step; a row's dword of the second step follows that of the first
                    parts = [base_three(code.load(code.at(steps, 64 * i + 32 * half), raw, 4)) for i in range(2)]
                    first, second = (b.bitcast(part, dwords) for part in parts)
                    for four in range(2):
                        mask = ir.Constant(dwords, [4 * four + i // 2 + 8 * (i % 2) for i in range(8)])
                        row_bytes = b.bitcast(b.shuffle_vector(first, second, mask), raw)
                        scaled = b.shl(b.zext(row_bytes, wide), ir.Constant(wide, [shift] * 32))
                        code.store(scaled, code.at(rows, 64 * (2 * half + four)), 32)
                return []

            code.loop(args[3], [], slab)
            return []

        code.loop(args[2], [], tile)
        return context.get_dummy_value()

    return sig, codegen


def _row_loop(start: bool):
    @intrinsic
    def add_rows(typingctx, isa, profile, sums, offsets, tables, rows):
        """sums[row] (+)= the row's entry of each of the eight tables; offsets uint16 [row][table]."""
        sig = types.void(isa, profile, *[types.int64] * 4)

        def codegen(context, builder, sig, args):
            code, b, args = Code(builder), builder, args[1:]
            size, _, kind = _vector(isa, profile)
            sums_at, offsets_at, tables_at = (code.pointer(a) for a in args[1:4])
            same = ir.FunctionType(I64, [I64])

            def row(r, _):
                place = code.at(sums_at, b.mul(r, code.i64(size)))
                total = None if start else code.load(place, kind, size)
                for table in range(TABLES):
                    if table % 4 == 0:
                        four = code.at(offsets_at, b.add(b.mul(r, code.i64(2 * TABLES)), code.i64(2 * table)))
                        # The CPU's loads are the limit: LLVM would split this one into four
                        packed = b.asm(same, "", "=r,0", [code.load(four, I64, 8)], side_effect=False)
                    offset = b.and_(b.lshr(packed, code.i64(16 * (table % 4))), code.i64(0xFFFF))
                    entry = code.load(code.at(code.at(tables_at, offset), table * ENTRIES * size), kind, size)
                    total = entry if total is None else b.add(total, entry)
                code.store(total, place, size)
                return []

            code.loop(args[4], [], row)
            return context.get_dummy_value()

        return sig, codegen

    return add_rows


_first_rows, _more_rows = _row_loop(True), _row_loop(False)


@intrinsic
def _scale(typingctx, isa, profile, sums, scales, stride, q_scale, tiles, y):
    """y[row][token] += float(sum) * (the row's scale * the token's), the scales fp16 [tile][..][16], tiles `stride` bytes apart."""
    sig = types.void(isa, profile, *[types.int64] * 6)

    def codegen(context, builder, sig, args):
        code, b, args = Code(builder), builder, args[1:]
        size, tokens, kind = _vector(isa, profile)
        sums_at, scales_at, q_at, y_at = (code.pointer(args[i]) for i in (1, 2, 4, 6))
        eight = ir.VectorType(kind.element, 8)
        parts = range(tokens // 8)
        own = [code.load(code.at(q_at, 32 * part), FLOATS, 4) for part in parts]

        def row(r, _):
            tile, lane = b.udiv(r, code.i64(16)), b.urem(r, code.i64(16))
            half = code.load(code.at(code.at(scales_at, b.mul(tile, args[3])), b.mul(lane, code.i64(2))), HALF, 2)
            scale = splatted(b, b.fpext(half, F32), 8)
            source, target = code.at(sums_at, b.mul(r, code.i64(size))), code.at(y_at, b.mul(r, code.i64(4 * tokens)))
            for part in parts:
                value = b.sitofp(code.load(code.at(source, size // len(parts) * part), eight, 16), FLOATS)
                place = code.at(target, 32 * part)
                code.store(b.fadd(code.load(place, FLOATS, 4), b.fmul(value, b.fmul(scale, own[part]))), place)
            return []

        code.loop(b.mul(args[5], code.i64(16)), [], row)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _turn(typingctx, y, y_stride, out, out_stride, add):
    """out[token][row] (+)= y[row][token], 8 of each, rows and tokens so many bytes apart."""
    sig = types.void(types.int64, types.int64, types.int64, types.int64, types.boolean)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        y_at, out_at = code.pointer(args[0]), code.pointer(args[2])
        rows = [code.load(code.at(y_at, b.mul(args[1], code.i64(r))), FLOATS, 4) for r in range(8)]
        halves = [
            ir.Constant(ir.VectorType(I32, 8), [first + i // 2 + 8 * (i % 2) for i in range(8)]) for first in (0, 4)
        ]
        for _ in range(3):
            rows = [b.shuffle_vector(rows[i], rows[i + 4], half) for i in range(4) for half in halves]
        for t, row in enumerate(rows):
            place = code.at(out_at, b.mul(args[3], code.i64(t)))
            code.store(b.select(args[4], b.fadd(code.load(place, FLOATS, 4), row), row), place)
        return context.get_dummy_value()

    return sig, codegen


@kernel
def _line(array):
    """The address of an array's first cache line."""
    return (address(array) + 63) // 64 * 64


@kernel
def _gather(s, x, q_scale):
    """The rows' activations as x [batch][column][token] and their scales as q_scale [batch][block][token]."""
    batches, k, tokens = x.shape
    for batch in range(batches):
        for t in range(tokens):
            r = batch * tokens + t
            for i in range(q_scale.shape[1]):
                q_scale[batch, i, t] = s.q_scale[r, i]
        for start in range(0, k, 16):
            for t in range(tokens):
                r = batch * tokens + t
                for i in range(start, start + 16):
                    x[batch, i, t] = s.q[r, i]


@kernel
def _put(y, n, out, first, add):
    """out[token, first + row] (+)= y[row, token] for n rows, as far as `out` has columns."""
    tokens = y.shape[1]
    for row in range(0, n, 8):
        column = first + row
        for t in range(0, tokens, 8):
            if column + 8 <= out.shape[1]:
                target = address(out) + t * out.strides[0] + column * 4
                _turn(address(y[row]) + t * 4, tokens * 4, target, out.strides[0], add)
            else:
                for c in range(column, out.shape[1]):
                    for u in range(t, t + 8):
                        value = y[row + c - column, u]
                        out[u, c] = out[u, c] + value if add else value


def by_tables(isa, profile, codes, scales, s, rows, k, block, out, add, first, end):
    """The product of the tiles first..end and as many of the `rows` as this way is good for; returns how many.

    codes, scales: of a PackedTernary. Writes what `matmul.multiply` says.
    """


@overload(by_tables, allocates=True)
def _by_tables(isa, profile, codes, scales, s, rows, k, block, out, add, first, end):
    if not PRIMITIVES[isa.instance_class].tables:
        return lambda isa, profile, codes, scales, s, rows, k, block, out, add, first, end: 0
    size, tokens, kind = _vector(isa, profile)
    integer = np.dtype(f"i{kind.element.width // 8}").type

    def body(isa, profile, codes, scales, s, rows, k, block, out, add, first, end):
        if rows < FEWEST_ROWS or end - first < FEWEST_TILES or block % COLUMNS != 0:
            return 0
        batches, blocks, slabs = rows // tokens, k // block, block // COLUMNS
        per_group = blocks // scales.shape[1]
        parts = (end - first + MOST_TILES - 1) // MOST_TILES
        most = (end - first + parts - 1) // parts * 16
        x = np.empty((batches, k, tokens), integer)
        q_scale = np.empty((batches, blocks, tokens), np.float32)
        _gather(s, x, q_scale)
        y = np.empty((batches, most, tokens), np.float32)  # [batch][row][token]
        sums = np.empty(64 + most * size, np.uint8)
        offsets = np.empty(64 + slabs * most * TABLES * 2, np.uint8)
        tables = np.empty(64 + (TABLES * ENTRIES + SPARE) * size, np.uint8)
        for part in range(parts):
            low = first + part * (end - first) // parts
            tiles = first + (part + 1) * (end - first) // parts - low
            n = tiles * 16
            y[:] = np.float32(0.0)
            for i in range(blocks):
                # taken here, where it is used: Numba frees an array after its last mention
                sums_at, offsets_at, tables_at = _line(sums), _line(offsets), _line(tables)
                at = address(codes) + low * codes.strides[0] + i * (block // 16) * codes.strides[1]
                _offsets(isa, at, codes.strides[0], tiles, slabs, offsets_at)
                scales_at = address(scales) + low * scales.strides[0] + i // per_group * scales.strides[1]
                for batch in range(batches):
                    for slab in range(slabs):
                        _build(isa, profile, address(x[batch]) + (i * block + slab * COLUMNS) * size, tables_at)
                        slab_at = offsets_at + slab * n * TABLES * 2
                        if slab == 0:
                            _first_rows(isa, profile, sums_at, slab_at, tables_at, n)
                        else:
                            _more_rows(isa, profile, sums_at, slab_at, tables_at, n)
                    q_at, y_at = address(q_scale[batch, i]), address(y[batch])
                    _scale(isa, profile, sums_at, scales_at, scales.strides[0], q_at, tiles, y_at)
            for batch in range(batches):
                _put(y[batch], n, out[batch * tokens : (batch + 1) * tokens], low * 16, add)
        return batches * tokens

    return body
