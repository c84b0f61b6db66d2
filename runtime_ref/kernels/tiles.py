"""The inner kernels as LLVM IR: 16 output rows times a few tokens, generated for an instruction set.

Each is an intrinsic whose loops carry every accumulator in a register. All write y fp32 [tokens, 16]; the arithmetic is
that of `reference.integer_matmul` and of a lane-ordered dot product. Layouts: `packed/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeAlias

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.arithmetic import Int8, Int16
from runtime_ref.kernels.isa import ALIGNED, PRIMITIVES, Primitives, broadcast, constant
from runtime_ref.kernels.packed.dense import PackedHalf
from runtime_ref.kernels.vector import LANES, ask_for_line, splatted, tree_of

# ruff: noqa: ANN001, ANN201, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

I8, I16, I32, I64, F32, HALF = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.FloatType(),
    ir.HalfType(),
)
ROWS = 16
# Bytes to ask for in advance, into the first cache and, further, into the second, which waits for more lines at once: the
# processor's own prefetching does not overlap enough of the memory's latency with our work.
AHEAD, FAR = 6144, 24576
V: TypeAlias = ir.Value
PLANES = {Int16: 2, Int8: 1}  # of bytes in an activation


class Code:
    """A builder with pointers as byte addresses and loops that carry values in registers."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def i64(self, value: int) -> V:
        return ir.Constant(I64, value)

    def pointer(self, address: V) -> V:
        return self.b.inttoptr(address, I8.as_pointer())

    def at(self, pointer: V, offset: V | int) -> V:
        return self.b.gep(pointer, [self.i64(offset) if isinstance(offset, int) else offset])

    def load(self, pointer: V, kind: ir.Type, align: int) -> V:
        return self.b.load(self.b.bitcast(pointer, kind.as_pointer()), align=align)

    def store(self, value: V, pointer: V, align: int = 4) -> None:
        self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()), align=align)

    def loop(self, count: V, values: list[V], body: Callable[[V, list[V]], list[V]]) -> list[V]:
        """for i in range(count): values = body(i, values); count is at least 1."""
        b = self.b
        before, inside, after = b.block, b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(inside)
        b.position_at_end(inside)
        i = b.phi(I64)
        carried = [b.phi(v.type) for v in values]
        results = body(i, list(carried))
        following = b.add(i, self.i64(1))
        end = b.block
        for phi, first, result in zip([i, *carried], [self.i64(0), *values], [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, end)
        b.cbranch(b.icmp_signed("<", following, count), inside, after)
        b.position_at_end(after)
        return results

    def prefetch(self, pointer: V) -> None:
        """Ask for the cache lines AHEAD and FAR of `pointer`: a prefetch past the end of an array is harmless."""
        ask_for_line(self.b, self.at(pointer, FAR), level=2)
        ask_for_line(self.b, self.at(pointer, AHEAD))


def zeros(kind: ir.VectorType, count: int) -> list[V]:
    return [ir.Constant(kind, None)] * count


def scale_vectors(code: Code, pointer: V, lanes: int) -> list[V]:
    """16 fp16 scales as fp32 vectors."""
    parts = []
    for part in range(ROWS // lanes):
        half = code.load(code.at(pointer, 2 * lanes * part), ir.VectorType(HALF, lanes), 2)
        parts.append(code.b.fpext(half, ir.VectorType(F32, lanes)))
    return parts


def accumulate(code: Code, y: list[V], totals: list[V], scales: list[V], q_scale: V) -> list[V]:
    """y + float(total) * (scale * q_scale), for the vectors of one token."""
    b, lanes = code.b, scales[0].type.count
    wide = splatted(b, q_scale, lanes)
    return [
        b.fadd(part, b.fmul(b.sitofp(total, scale.type), b.fmul(scale, wide)))
        for part, total, scale in zip(y, totals, scales, strict=True)
    ]


def store_rows(code: Code, y: list[V], out: V, tokens: int, lanes: int) -> None:
    parts = ROWS // lanes
    for index, part in enumerate(y):
        code.store(part, code.at(out, 4 * (index // parts * ROWS + index % parts * lanes)))


@intrinsic(prefer_literal=True)
def ternary_tile(
    typingctx, isa, profile, tokens, codes, scales, high, low, q_stride, q_scale, q_sum, b_stride, groups, per_group, steps, out
):  # fmt: skip
    """One tile of a PackedTernary times `tokens` (literal) rows.

    codes, scales: addresses of the tile; high, low: of the first row's int8 planes (high is read in profile exact only),
    q_stride bytes a row; q_scale, q_sum: b_stride elements a row; groups of per_group blocks of `steps` steps of 16.
    """
    primitives: Primitives = PRIMITIVES[isa.instance_class]
    planes = PLANES[profile.instance_class]
    count = tokens.literal_value
    args_type = [types.int64] * 12
    sig = types.void(isa, profile, tokens, *args_type)

    def codegen(context, builder, sig, args):
        code, lanes = Code(builder), primitives.lanes
        parts = ROWS // lanes
        codes_at, scales_at, high_at, low_at, q_scale_at, q_sum_at, out_at = (
            code.pointer(args[i]) for i in (3, 4, 5, 6, 8, 9, 15 - 1)
        )
        q_stride, b_stride, groups, per_group, steps = args[7], args[10], args[11], args[12], args[13]
        b = builder
        plane_rows = [
            [code.at(at, b.mul(q_stride, code.i64(t))) for t in range(count)] for at in (low_at, high_at)[:planes]
        ]
        vector = ir.VectorType(I32, lanes)
        places = primitives.bytes.places[planes - 1] if count == 1 else ALIGNED
        kinds, each = sorted(set(places)), planes * count * parts

        def step(first: V, sums: list[V]) -> list[V]:
            base = code.at(codes_at, b.mul(first, code.i64(4 * ROWS)))
            if count == 1:
                code.prefetch(base)
            raw = [code.load(code.at(base, 4 * lanes * part), vector, 4) for part in range(parts)]
            offset = b.mul(first, code.i64(16))
            quads = [[code.at(row, offset) for row in rows] for rows in plane_rows]
            for field in range(4):
                fields = [field_at(r, field, places[field]) for r in raw]
                kind = kinds.index(places[field])
                for plane in range(planes):
                    for t in range(count):
                        q = primitives.bytes.words(b, quads[plane][t], field)
                        for part in range(parts):
                            index = (plane * count + t) * parts + part + each * kind
                            sums[index] = primitives.bytes.dot(b, sums[index], fields[part], q, field)
            return sums

        def field_at(raw: V, field: int, place: int) -> V:
            """A code of every byte, brought to bit `place` of it."""
            if field == 3 and place == 0:  # nothing is above it: a shift of bytes, where there is one, is all
                whole = b.bitcast(raw, ir.VectorType(I8, 4 * lanes))
                return b.bitcast(b.lshr(whole, constant(I8, 4 * lanes, 6)), vector)
            moved = b.lshr(raw, constant(I32, lanes, 2 * field - place))
            return b.and_(moved, constant(I32, lanes, 0x03030303 << place))

        def joined(sums: list[V]) -> list[V]:
            """The sums of all places as one; each is an exact multiple of its place."""
            if kinds == [0]:
                return sums
            shifted = [b.ashr(s, constant(I32, lanes, kinds[i // each])) for i, s in enumerate(sums)]
            return [reduce(b.add, shifted[i::each]) for i in range(each)]

        def block(index: V, scale_parts: list[V], y: list[V]) -> list[V]:
            first = b.mul(index, steps)
            nothing = zeros(primitives.bytes.sums, each * len(kinds))
            sums = joined(code.loop(steps, nothing, lambda i, values: step(b.add(first, i), values)))
            result: list[V] = []
            for t in range(count):
                place = b.add(b.mul(b_stride, code.i64(t)), index)
                offset = b.mul(place, code.i64(4))
                q_total = broadcast(b, code.at(q_sum_at, offset), lanes)
                totals = []
                for part in range(parts):
                    total = primitives.bytes.total(b, sums[t * parts + part], 0)
                    if planes == 2:
                        upper = primitives.bytes.total(b, sums[(count + t) * parts + part], 8)
                        total = b.add(total, upper)
                    totals.append(b.sub(total, q_total))
                scale = code.load(code.at(q_scale_at, offset), F32, 4)
                result += accumulate(code, y[t * parts : (t + 1) * parts], totals, scale_parts, scale)
            return result

        def group(index: V, y: list[V]) -> list[V]:
            scale_parts = scale_vectors(code, code.at(scales_at, b.mul(index, code.i64(2 * ROWS))), lanes)
            first = b.mul(index, per_group)
            return code.loop(per_group, y, lambda i, values: block(b.add(first, i), scale_parts, values))

        y = code.loop(groups, zeros(ir.VectorType(F32, lanes), count * parts), group)
        store_rows(code, y, out_at, count, lanes)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic(prefer_literal=True)
def dense_tile(typingctx, kind, rows, tokens, values, row_bytes, x, x_stride, steps, out):
    """`rows` (literal) rows of a PackedHalf or PackedFloat times `tokens` (literal) rows of x fp32: y [tokens, 16].

    values: address of the first row, row_bytes apart; x: of the first token, x_stride bytes apart; steps of 16.
    """
    n_rows, count = rows.literal_value, tokens.literal_value
    stored = HALF if kind.instance_class is PackedHalf else F32
    sig = types.void(kind, rows, tokens, *[types.int64] * 6)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        values_at, x_at, out_at = (code.pointer(args[i]) for i in (3, 5, 8))
        w_rows = [code.at(values_at, b.mul(args[4], code.i64(r))) for r in range(n_rows)]
        x_rows = [code.at(x_at, b.mul(args[6], code.i64(t))) for t in range(count)]
        vector, size = ir.VectorType(F32, LANES), 2 if stored == HALF else 4

        def step(i: V, lanes: list[V]) -> list[V]:
            w_offset, x_offset = b.mul(i, code.i64(LANES * size)), b.mul(i, code.i64(LANES * 4))
            xs = [code.load(code.at(x_row, x_offset), vector, 4) for x_row in x_rows]
            for r, w_row in enumerate(w_rows):
                if count == 1:
                    code.prefetch(code.at(w_row, w_offset))
                w = code.load(code.at(w_row, w_offset), ir.VectorType(stored, LANES), size)
                if stored == HALF:
                    w = b.fpext(w, vector)
                for t, x_part in enumerate(xs):
                    lanes[t * n_rows + r] = b.fadd(lanes[t * n_rows + r], b.fmul(w, x_part))
            return lanes

        lanes = code.loop(args[7], zeros(vector, n_rows * count), step)
        for index, sums in enumerate(lanes):
            place = code.at(out_at, 4 * (index // n_rows * ROWS + index % n_rows))
            code.store(tree_of(b, sums, b.fadd), place)
        return context.get_dummy_value()

    return sig, codegen
