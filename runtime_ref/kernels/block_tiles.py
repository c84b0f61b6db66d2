"""The inner kernels of Q8_0 and Q4_0: 16 output rows times a few tokens, products of bytes (`tiles.py` has ternary's).

Activations come as int8 planes, q = 256 * high + low, or low alone; a block of 32 weights meets one block of 32 activations.

    Q4_0   codes + 8 (0..15) times a plane, minus 8 times the sum of q. Eight words of such products fit int16 sums, so
           every instruction set takes them
    Q8_0   with vpdpbusd codes + 128 (unsigned), minus 128 times the sum of q; with sdot the codes as they are. Sums in int16
           are too narrow for a whole byte: AVX2 and Neon without dotprod widen codes to int16 and take pairs of q itself
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.kernels.isa import PRIMITIVES, Primitives, broadcast, constant
from runtime_ref.kernels.tiles import (
    F32,
    I8,
    I16,
    I32,
    PLANES,
    ROWS,
    Code,
    V,
    accumulate,
    scale_vectors,
    store_rows,
    zeros,
)  # fmt: skip

# ruff: noqa: ANN001, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

BLOCK = 32
_EVEN_FIRST = (0, 2, 1, 3)  # bytes of a dword, so that its 16-bit halves hold neighbours


class Sums:
    """How a block's products are summed, for an instruction set and so many planes and tokens.

    words: dwords of codes a row and block. count: accumulators. add(base, planes, pairs, sums): the block's products from
    the tile's codes at `base`. total(sums, token, part): the int32 sum of code * q of one vector of rows, without `offset`
    times the sum of q.
    """

    offset = 0  # or a power of two

    def __init__(self, code: Code, primitives: Primitives, tokens: int, planes: int) -> None:
        self.code, self.of, self.tokens, self.planes = code, primitives, tokens, planes
        self.parts = ROWS // primitives.lanes

    def load(self, base: V, word: int) -> list[V]:
        """The word-th dword of 16 rows, as vectors of int32."""
        kind, step = ir.VectorType(I32, self.of.lanes), 4 * ROWS
        if self.tokens == 1:
            self.code.prefetch(self.code.at(base, step * word))
        return [
            self.code.load(self.code.at(base, step * word + 4 * self.of.lanes * p), kind, 4) for p in range(self.parts)
        ]


class ByteSums(Sums):
    """Of bytes times planes."""

    def __init__(self, code: Code, primitives: Primitives, tokens: int, planes: int, bits: int) -> None:
        super().__init__(code, primitives, tokens, planes)
        self.bits, self.words = bits, bits  # a dword holds 4 codes, or 8
        whole = primitives.bytes.whole
        self.offset = 8 if bits == 4 else (whole or 0)
        self.apart = tokens == 1 and bits == 4 and primitives.bytes.in_place  # high nibbles stay where they are
        self.each = planes * tokens * self.parts
        self.kind, self.count = primitives.bytes.sums, self.each * (2 if self.apart else 1)

    def _fields(self, raw: list[V]) -> list[list[V]]:
        """Vectors of 4 codes a lane, each for the next 4 columns."""
        b, lanes = self.code.b, self.of.lanes
        if self.bits == 8:
            flip = constant(I32, lanes, -2139062144)  # 0x80 in every byte: a signed byte and 128
            return [[b.xor(r, flip) for r in raw] if self.offset else raw]
        low = [b.and_(r, constant(I32, lanes, 0x0F0F0F0F)) for r in raw]
        if self.apart:
            return [low, [b.and_(r, constant(I32, lanes, -252645136)) for r in raw]]  # 0xF0 in every byte
        shifted = [b.lshr(r, constant(I32, lanes, 4)) for r in raw]
        return [low, [b.and_(r, constant(I32, lanes, 0x0F0F0F0F)) for r in shifted]]

    def add(self, base: V, planes: list[list[V]], pairs: list[V], sums: list[V]) -> list[V]:
        code, products = self.code, self.of.bytes
        for word in range(self.words):
            for field, codes in enumerate(self._fields(self.load(base, word))):
                quad = word * (8 // self.bits) + field
                for plane in range(self.planes):
                    for t in range(self.tokens):
                        start = code.at(planes[plane][t], 16 * (quad // 4))
                        q = products.words(code.b, start, quad % 4)
                        for part in range(self.parts):
                            at = (plane * self.tokens + t) * self.parts + part + self.each * field * self.apart
                            sums[at] = products.dot(code.b, sums[at], codes[part], q, quad % 4)
        return sums

    def total(self, sums: list[V], token: int, part: int) -> V:
        b, products = self.code.b, self.of.bytes
        result = None
        for plane in range(self.planes):
            at = (plane * self.tokens + token) * self.parts + part
            own = sums[at]
            if self.apart:
                own = b.add(own, b.ashr(sums[at + self.each], constant(I32, self.of.lanes, 4)))
            shift = 8 * plane
            own = products.total(b, own, shift)
            result = own if result is None else b.add(result, own)
        return result


class PairSums(Sums):
    """Of Q8_0's codes widened to int16, times q itself."""

    def __init__(self, code: Code, primitives: Primitives, tokens: int, planes: int, bits: int) -> None:
        super().__init__(code, primitives, tokens, planes)
        self.words, self.kind, self.count = 8, primitives.pairs.sums, tokens * self.parts

    def _halves(self, raw: V) -> list[V]:
        """Columns 0 and 1, then 2 and 3, of every dword as int16."""
        b, lanes = self.code.b, self.of.lanes
        quads = b.bitcast(raw, ir.VectorType(I8, 4 * lanes))
        order = ir.Constant(ir.VectorType(I32, 4 * lanes), [4 * i + j for i in range(lanes) for j in _EVEN_FIRST])
        halves = b.bitcast(b.shuffle_vector(quads, quads, order), ir.VectorType(I16, 2 * lanes))
        eight = constant(I16, 2 * lanes, 8)
        return [b.bitcast(h, raw.type) for h in (b.ashr(b.shl(halves, eight), eight), b.ashr(halves, eight))]

    def add(self, base: V, planes: list[list[V]], pairs: list[V], sums: list[V]) -> list[V]:
        code, products = self.code, self.of.pairs
        for word in range(self.words):
            split = [self._halves(raw) for raw in self.load(base, word)]
            for pair in range(2):
                for t in range(self.tokens):
                    q = products.words(code.b, code.at(pairs[t], 8 * word + 4 * pair), 0)
                    for part in range(self.parts):
                        at = t * self.parts + part
                        sums[at] = products.dot(code.b, sums[at], split[part][pair], q, 0)
        return sums

    def total(self, sums: list[V], token: int, part: int) -> V:
        return self.of.pairs.total(self.code.b, sums[token * self.parts + part], 0)


def block_sums(isa_class: type, bits: int) -> type:
    """How an instruction set sums products with codes of so many bits."""
    narrow = PRIMITIVES[isa_class].bytes.whole is None
    return PairSums if bits == 8 and narrow else ByteSums


def together(isa_class: type, activations_class: type, bits: int) -> int:
    """Tokens that a tile takes at a time."""
    planes = 1 if block_sums(isa_class, bits) is PairSums else PLANES[activations_class]
    return max(1, PRIMITIVES[isa_class].pairs.in_flight // planes)


def _block_tile(bits: int) -> Any:
    @intrinsic(prefer_literal=True)
    def tile(
        typingctx, isa, activations, tokens, codes, scales, q, high, low, q_stride, q_scale, q_sum, b_stride, blocks, out
    ):  # fmt: skip
        """One tile of a PackedQ8 or PackedQ4 times `tokens` (literal) rows.

        codes, scales: addresses of the tile; q, high, low: of the first row's activations, q_stride elements a row (high is
        read with two planes only); q_scale, q_sum: b_stride elements a row; blocks of 32.
        """
        primitives = PRIMITIVES[isa.instance_class]
        planes, count = PLANES[activations.instance_class], tokens.literal_value
        sig = types.void(isa, activations, tokens, *[types.int64] * 11)

        def codegen(context, builder, sig, args):
            code, b, lanes = Code(builder), builder, primitives.lanes
            sums_of = block_sums(isa.instance_class, bits)(code, primitives, count, planes, bits)
            parts = sums_of.parts
            codes_at, scales_at, q_at, high_at, low_at = (code.pointer(args[i]) for i in range(3, 8))
            q_stride, b_stride, blocks = args[8], args[11], args[12]
            q_scale_at, q_sum_at, out_at = (code.pointer(args[i]) for i in (9, 10, 13))
            apart = [b.mul(q_stride, code.i64(t)) for t in range(count)]
            plane_rows = [[code.at(at, a) for a in apart] for at in (low_at, high_at)[:planes]]
            pair_rows = [code.at(q_at, b.mul(a, code.i64(2))) for a in apart]

            def block(index: V, y: list[V]) -> list[V]:
                base = code.at(codes_at, b.mul(index, code.i64(BLOCK * bits // 8 * ROWS)))
                scale_parts = scale_vectors(code, code.at(scales_at, b.mul(index, code.i64(2 * ROWS))), lanes)
                column = b.mul(index, code.i64(BLOCK))
                rows = [[code.at(row, column) for row in rows] for rows in plane_rows]
                wide = [code.at(row, b.mul(column, code.i64(2))) for row in pair_rows]
                sums = sums_of.add(base, rows, wide, zeros(sums_of.kind, sums_of.count))
                result: list[V] = []
                for t in range(count):
                    place = b.mul(b.add(b.mul(b_stride, code.i64(t)), index), code.i64(4))
                    totals = [sums_of.total(sums, t, part) for part in range(parts)]
                    if sums_of.offset:
                        shift = constant(I32, lanes, sums_of.offset.bit_length() - 1)
                        more = b.shl(broadcast(b, code.at(q_sum_at, place), lanes), shift)
                        totals = [b.sub(total, more) for total in totals]
                    scale = code.load(code.at(q_scale_at, place), F32, 4)
                    result += accumulate(code, y[t * parts : (t + 1) * parts], totals, scale_parts, scale)
                return result

            y = code.loop(blocks, zeros(ir.VectorType(F32, lanes), count * parts), block)
            store_rows(code, y, out_at, count, lanes)
            return context.get_dummy_value()

        return sig, codegen

    return tile


q8_tile = _block_tile(8)
q4_tile = _block_tile(4)
