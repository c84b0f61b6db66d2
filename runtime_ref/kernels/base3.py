"""Products with a PackedBase3: a triple of codes is a number below 27, so that one permutation of bytes looks up a digit of the triple's
sum of activations for 64 rows.

For each triple of columns the 27 sums are made once for all rows, and cut into digits: fast, 384 + sum = d0 + 32 d1; exact, with the two
planes of the activations, 384 (256 + 1) + sum = d0 + 64 d1 + 4096 d2. Digits add up in bytes as long as they fit, then in 16 bits.
The integers are those of `tiles.ternary_tile` and meet the scales in the same order, so the results are the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.kernels.amx_base3 import by_amx_base3
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import overload, stack
from runtime_ref.kernels.isa import PRIMITIVES, constant
from runtime_ref.kernels.output import put_row
from runtime_ref.kernels.packed.base3 import BLOCKS, PackedBase3
from runtime_ref.kernels.tiles import F32, HALF, I32, I64, PLANES, Code, V, accumulate
from runtime_ref.kernels.triples import BYTES, WORDS, indices, instruction, looked_up, same
from runtime_ref.kernels.vector import address

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

BIAS = 384  # makes the sum of three bytes -128..127 positive
DIGIT = {1: 5, 2: 6}  # bits of a digit, by planes of activations
TABLE = 64  # bytes: the 27 digits, again from 32 on, as an index has a sixth bit of something else
ROOM = 4 * -(-max(BLOCKS) // 12) * TABLE * 3
_A, _B = ([8 * (i // 4) + 4 * half + i % 4 for i in range(16)] for half in (0, 1))  # as packssdw joins them


def _coefficients(entries: list[int], places: dict[int, int]) -> ir.Constant:
    """For each entry, a code -1..1 in those bytes of a dword: {byte: which digit of the entry}."""
    values = [(e // 3 ** places[b] % 3 - 1) if b in places and e < 27 else 0 for e in entries for b in range(4)]
    return ir.Constant(BYTES, values)


def _biases(entries: list[int]) -> ir.Constant:
    """What makes 128 more in each activation BIAS more in the sum."""
    codes = [sum(e // 3**i % 3 - 1 for i in range(3)) if e < 27 else 0 for e in entries]
    return ir.Constant(ir.VectorType(I32, 16), [BIAS - 128 * code for code in codes])


@intrinsic
def _sums(typingctx, isa, profile, low, high, sets, tables):
    """The digits' tables of `sets` twelves of columns: uint8 [triple][digit][64] from activations' planes int8 (fast: low alone)."""
    dot = PRIMITIVES[isa.instance_class].bytes.dot
    planes = PLANES[profile.instance_class]
    digits = planes + 1
    sig = types.void(isa, profile, *[types.int64] * 4)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        sources, tables_at = [code.pointer(a) for a in args[2:4]][:planes], code.pointer(args[5])
        even, odd = (ir.Constant(BYTES, [2 * (i % 32) + part for i in range(64)]) for part in (0, 1))
        apart = [{0: 0, 1: 1, 2: 2}], [{3: 0}, {3: 1}, {3: 2}]

        def dwords(source: V, column: V) -> list[V]:
            """Three dwords of activations with 128 added, as `dot` takes unsigned bytes."""
            found = []
            for quad in range(3):
                word = code.load(code.at(source, b.add(column, code.i64(4 * quad))), I32, 1)
                word = b.xor(word, ir.Constant(I32, 0x80808080))
                lanes = b.insert_element(ir.Constant(ir.VectorType(I32, 16), ir.Undefined), word, ir.Constant(I32, 0))
                found.append(b.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(I32, 16), [0] * 16)))
            return found

        def sums(words: list[V], places: list[dict[int, int]]) -> V:
            """BIAS + the 27 sums, 16 bits each."""
            halves = []
            for entries in (_A, _B):
                total = _biases(entries)
                for word, of_word in zip(words, places, strict=True):
                    total = dot(b, total, word, _coefficients(entries, of_word), 0)
                halves.append(total)
            return instruction(b, "avx512.packssdw.512", WORDS, *halves)

        def store(triple: int, first: V, values: list[V]) -> None:
            place = code.at(tables_at, b.mul(first, code.i64(4 * digits * TABLE)))
            for digit, value in enumerate(values):
                code.store(value, code.at(place, (triple * digits + digit) * TABLE), 64)

        def split(value: V, size: int) -> V:
            """Two digits of `size` bits in the bytes of a word."""
            upper = b.and_(b.shl(value, same(WORDS, 8 - size)), same(WORDS, (2**size - 1) << 8))
            return b.bitcast(b.or_(b.and_(value, same(WORDS, 2**size - 1)), upper), BYTES)

        def body(i: V, _: list[V]) -> list[V]:
            words = [dwords(source, b.mul(i, code.i64(12))) for source in sources]
            for triple, (chosen, places) in enumerate(
                [([0], apart[0]), ([0, 1, 2], apart[1]), ([1], apart[0]), ([2], apart[0])]
            ):
                of = [sums([w[c] for c in chosen], places) for w in words]
                if planes == 1:
                    both = split(of[0], 5)
                    store(triple, i, [looked_up(b, both, part) for part in (even, odd)])
                else:
                    lowest = b.bitcast(b.and_(of[0], same(WORDS, 63)), BYTES)
                    rest = split(b.add(b.lshr(of[0], same(WORDS, 6)), b.shl(of[1], same(WORDS, 2))), 6)
                    pieces = [(lowest, even), (rest, even), (rest, odd)]
                    store(triple, i, [looked_up(b, *piece) for piece in pieces])
            return []

        code.loop(args[4], [], body)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _tile(typingctx, profile, codes, tables, groups, pairs, scales, q_scale, y):
    """y fp32 [64] += one block of a tile: codes uint8 [bytes][64], `groups` of eight triples and `pairs` of bytes with three."""
    planes = PLANES[profile.instance_class]
    digits, size = planes + 1, DIGIT[planes]
    sig = types.void(profile, *[types.int64] * 7)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        codes_at, tables_at, scales_at, q_scale_at, y_at = (code.pointer(args[i]) for i in (1, 2, 5, 6, 7))
        eight = same(WORDS, 8)

        def part(start: V, first_table: V, n_bytes: int, sums: list[V], waits: int) -> list[V]:
            """Sums of some bytes' triples; after `waits` of them digits might not fit a byte any more."""
            x = []
            for i in range(n_bytes):
                place = code.at(start, TABLE * i)
                code.prefetch(place)
                x.append(code.load(place, BYTES, 64))
            found, held = list(sums), 0
            bytes_: list[V] = []
            for triple, index in enumerate(indices(b, x)):
                for digit in range(digits):
                    entry = code.load(code.at(first_table, (triple * digits + digit) * TABLE), BYTES, 64)
                    value = looked_up(b, entry, index)
                    if held:
                        bytes_[digit] = b.add(bytes_[digit], value)
                    else:
                        bytes_.append(value)
                held += 1
                if held == waits or triple == {2: 2, 5: 7}[n_bytes]:
                    for digit, value in enumerate(bytes_):
                        words = b.bitcast(value, WORDS)
                        found[2 * digit] = b.add(found[2 * digit], words)
                        found[2 * digit + 1] = b.add(found[2 * digit + 1], b.lshr(words, eight))
                    bytes_, held = [], 0
            return found

        waits, tables_of = (8, 4)[planes - 1], digits * TABLE
        sums = [ir.Constant(WORDS, None)] * (2 * digits)
        sums = code.loop(
            args[3],
            sums,
            lambda i, values: part(
                code.at(codes_at, b.mul(i, code.i64(5 * TABLE))),
                code.at(tables_at, b.mul(i, code.i64(8 * tables_of))),
                5,
                values,
                waits,
            ),
        )
        rest = code.at(codes_at, b.mul(args[3], code.i64(5 * TABLE)))
        rest_tables = code.at(tables_at, b.mul(args[3], code.i64(8 * tables_of)))
        sums = code.loop(
            args[4],
            sums,
            lambda i, values: part(
                code.at(rest, b.mul(i, code.i64(2 * TABLE))),
                code.at(rest_tables, b.mul(i, code.i64(3 * tables_of))),
                2,
                values,
                waits,
            ),
        )
        triples = b.add(b.mul(args[3], code.i64(8)), b.mul(args[4], code.i64(3)))
        q_scale = code.load(q_scale_at, F32, 4)
        for sub, total in enumerate(_totals(b, sums, triples, planes, size)):
            scale = b.fpext(code.load(code.at(scales_at, 32 * sub), ir.VectorType(HALF, 16), 2), ir.VectorType(F32, 16))
            place = code.at(y_at, 64 * sub)
            before = code.load(place, ir.VectorType(F32, 16), 4)
            (after,) = accumulate(code, [before], [total], [scale], q_scale)
            code.store(after, place)
        return context.get_dummy_value()

    def _totals(b: ir.IRBuilder, sums: list[V], triples: V, planes: int, size: int) -> list[V]:
        """int32 [16] of the rows 0.., 16.., 32.., 48..: of even bytes and odd ones, low words and high ones."""
        digits, parts = planes + 1, []
        for parity in (0, 1):
            odd = [sums[2 * d + 1] for d in range(digits)]
            parts.append(odd if parity else [b.sub(sums[2 * d], b.shl(odd[d], same(WORDS, 8))) for d in range(digits)])
        bias = b.mul(triples, ir.Constant(I64, BIAS * (257 if planes == 2 else 1)))
        found = []
        for high in (0, 1):
            for of_digits in parts:
                words = [b.bitcast(d, ir.VectorType(I32, 16)) for d in of_digits]
                sixteen = constant(I32, 16, 16)
                lanes = [b.lshr(w, sixteen) if high else b.and_(w, constant(I32, 16, 0xFFFF)) for w in words]
                total = lanes[0]
                for digit, lane in enumerate(lanes[1:], 1):
                    total = b.add(total, b.shl(lane, constant(I32, 16, digit * size)))
                one = b.insert_element(
                    ir.Constant(ir.VectorType(I32, 16), ir.Undefined), b.trunc(bias, I32), ir.Constant(I32, 0)
                )
                found.append(b.sub(total, b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, 16), [0] * 16))))
        return found

    return sig, codegen


def by_sums(isa, activations, packed, s, rows, k, block, out, add, first, end):
    """The product of the tiles first..end and all `rows`; writes what `matmul.multiply` says."""


@overload(by_sums, allocates=True)
def _by_sums(isa, activations, packed, s, rows, k, block, out, add, first, end):
    def body(isa, activations, packed, s, rows, k, block, out, add, first, end):
        blocks, sets, triples = k // block, (block + 11) // 12, (block + 2) // 3
        groups, pairs = triples // 8, triples % 8 // 3
        per_group = blocks // packed.scales.shape[0]
        y = np.zeros((rows, end - first, 64), np.float32)
        tables = stack(ROOM)
        for i in range(blocks):
            codes_at = address(packed.codes) + i * packed.codes.strides[0]
            scales_at = address(packed.scales) + i // per_group * packed.scales.strides[0]
            for r in range(rows):
                q = r * s.low.strides[0] + i * block
                _sums(isa, activations, address(s.low) + q, address(s.high) + q, sets, tables)
                q_scale = address(s.q_scale) + 4 * (r * s.q_scale.shape[1] + i)
                y_at = address(y) + r * y.strides[0]
                for tile in range(first, end):
                    _tile(
                        activations, codes_at + tile * packed.codes.strides[1], tables, groups, pairs,
                        scales_at + tile * packed.scales.strides[1], q_scale, y_at + 256 * (tile - first),
                    )  # fmt: skip
        for r in range(rows):
            for tile in range(first, end):
                at = address(y) + r * y.strides[0] + 256 * (tile - first)
                for part in range(4):
                    put_row(out, r, 4 * tile + part, at + 64 * part, add)
        return y[0, 0, 0]  # Numba frees an array after its last mention

    return body


def product(isa_class: type, activations_class: type, many: bool) -> Callable[..., None]:
    """`matmul.multiply` for a PackedBase3; `many`: with the ways that pay for many tokens only."""

    def for_few(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        first, end = share(packed.codes.shape[1], tid, threads)
        if end > first:
            by_sums(isa, activations, packed, s, rows, k, block, out, add, first, end)

    def for_many(isa, activations, packed, s, rows, k, block, out, add, tid, threads):
        first, end = share(packed.codes.shape[1], tid, threads)
        if end > first and not by_amx_base3(isa, activations, packed, s, rows, k, block, out, add, first, end):
            by_sums(isa, activations, packed, s, rows, k, block, out, add, first, end)

    return for_many if many else for_few


PRODUCTS, EMBEDDINGS = {PackedBase3: product}, {}
UNQUANTISED = ()
