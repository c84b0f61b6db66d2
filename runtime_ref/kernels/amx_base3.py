"""The product of many tokens with a PackedBase3 by AMX: a tile of 64 rows is spread to bytes for all tokens, then multiplied as in `amx`."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.kernels.amx import (
    FEWEST_ROWS,
    SUMS,
    TILE,
    TOKENS,
    amx_begin,
    amx_end,
    multiply_tiles,
    planes_of,
    scale_sums,
)
from runtime_ref.kernels.compiled import overload
from runtime_ref.kernels.isa import PRIMITIVES
from runtime_ref.kernels.output import put_row
from runtime_ref.kernels.packed.base3 import ROWS
from runtime_ref.kernels.tiles import I8, Code, V
from runtime_ref.kernels.triples import BYTES, indices, instruction, looked_up
from runtime_ref.kernels.vector import address, ask_for, ask_for_line, splatted

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

PARTS = 4  # tiles of 16 rows in one of 64


def _looked_up(fields: dict[int, int]) -> ir.Constant:
    """For each triple, its codes in fields of two bits, -1 being 3: {field: which code}; again from 32 on."""
    values = [sum((e % 32 // 3**d % 3 - 1 & 3) << 2 * f for f, d in fields.items()) for e in range(64)]
    return ir.Constant(BYTES, values)


_THREE, _FOURTHS = _looked_up({0: 0, 1: 1, 2: 2}), [_looked_up({3: quad}) for quad in range(3)]
# Linear in a byte's bits: bit 0 stays, bit 1 is the sign and fills those above it (the last row is of the lowest bit)
_SIGNED = ir.Constant(BYTES, [*[2] * 7, 1] * 8)


@intrinsic
def _spread(typingctx, profile, codes, groups, pairs, ahead, weights, stride, start):
    """A block of some of a tile's four parts, from part `start` on, as int8 [parts][column / 4][16 rows][4], `stride` bytes
    apart; asks for the codes `ahead` bytes further.
    """
    parts = SUMS // planes_of(profile)

    def codegen(context, builder, sig, args):
        code, b = Code(builder), builder
        codes_at, weights_at = code.pointer(args[1]), code.pointer(args[5])
        first_bit = splatted(b, b.trunc(b.mul(args[7], code.i64(8)), I8), 64)
        places = []
        for part in range(parts):
            fields = [32 * (i // 4 % 2) + 8 * part + 2 * (i % 4) for i in range(64)]
            places.append(b.add(ir.Constant(BYTES, fields), first_bit))

        def quads(start: V, n_bytes: int) -> list[V]:
            """Bytes of four codes, a quad of columns each, out of some bytes of triples."""
            x = []
            for i in range(n_bytes):
                place = code.at(start, ROWS * i)
                ask_for_line(b, code.at(place, args[4]), level=2)
                x.append(code.load(place, BYTES, 64))
            return indices(b, x)

        def joined(triples: list[V]) -> list[V]:
            """Quads of up to four triples: the first, the fourths of all, the second and the third."""
            return [
                b.or_(looked_up(b, _THREE, first), looked_up(b, fourths, triples[1]))
                for first, fourths in zip([triples[0], *triples[2:]], _FOURTHS, strict=False)
            ]

        def put(found: list[V], first: V) -> None:
            for number, quad in enumerate(found):
                for part, place in enumerate(places):
                    apart = instruction(b, "avx512.pmultishift.qb.512", BYTES, place, quad)
                    value = instruction(b, "vgf2p8affineqb.512", BYTES, apart, _SIGNED, ir.Constant(I8, 0))
                    own = code.at(weights_at, b.mul(args[6], code.i64(part)))
                    code.store(value, code.at(own, b.mul(b.add(first, code.i64(number)), code.i64(64))), 64)

        def group(i: V, _: list[V]) -> list[V]:
            triples = quads(code.at(codes_at, b.mul(i, code.i64(5 * ROWS))), 5)
            put([*joined(triples[:4]), *joined(triples[4:])], b.mul(i, code.i64(6)))
            return []

        code.loop(args[2], [], group)
        rest, first = code.at(codes_at, b.mul(args[2], code.i64(5 * ROWS))), b.mul(args[2], code.i64(6))
        with b.if_else(b.icmp_signed("==", args[3], code.i64(1))) as (one, two):
            with one:
                put(joined(quads(rest, 2)), first)
            with two:
                triples = quads(rest, 2) + quads(code.at(rest, 2 * ROWS), 2)
                put([*joined(triples[:4]), *joined(triples[4:])], first)
        return context.get_dummy_value()

    return types.void(profile, *[types.int64] * 7), codegen


def by_amx_base3(isa, activations, packed, s, rows, k, block, out, add, first, end):
    """The product of the tiles first..end and all `rows`, or nothing; returns how many rows it was."""


@overload(by_amx_base3, allocates=True)
def _by_amx_base3(isa, activations, packed, s, rows, k, block, out, add, first, end):
    if not PRIMITIVES[isa.instance_class].matrices:
        return lambda isa, activations, packed, s, rows, k, block, out, add, first, end: 0
    planes = planes_of(activations)
    together = SUMS // planes

    def body(isa, activations, packed, s, rows, k, block, out, add, first, end):
        if rows < FEWEST_ROWS:
            return 0
        codes, scales, triples = packed.codes, packed.scales, (block + 2) // 3
        columns = 64 if block % 64 == 0 else 32
        blocks, spread = k // block, block * TOKENS + 192  # not a multiple of 4096 apart
        per_group = blocks // scales.shape[0]
        q_stride, b_stride = s.low.strides[0], s.q_scale.shape[1]
        memory = np.empty(64 + (1 + SUMS) * TILE + together * spread, np.uint8)
        y = np.empty((together, rows, TOKENS), np.float32)
        shape = (address(memory) + 63) // 64 * 64
        sums = shape + TILE
        weights = sums + SUMS * TILE
        amx_begin(columns, min(TOKENS, rows), shape)
        for start in range(PARTS * first, PARTS * end, together):
            tile, part = start // PARTS, start % PARTS
            y[:] = np.float32(0.0)
            for r in range(rows):  # the states that passed since have taken these out of the caches
                for own in range(together):
                    ask_for(address(out) + r * out.strides[0] + 64 * (start + own))
            for i in range(blocks):
                at = address(codes) + i * codes.strides[0] + tile * codes.strides[1]
                _spread(activations, at, triples // 8, triples % 8 // 3, codes.strides[1], weights, spread, part)
                scales_at = address(scales) + i // per_group * scales.strides[0] + tile * scales.strides[1]
                for r in range(0, rows, TOKENS):
                    q, q_scale = r * q_stride + i * block, address(s.q_scale) + 4 * (r * b_stride + i)
                    multiply_tiles(
                        activations, weights, spread, address(s.low) + q, address(s.high) + q, q_stride, columns,
                        block // columns, sums,
                    )  # fmt: skip
                    for own in range(together):
                        scale_sums(
                            activations, sums + own * planes * TILE, scales_at + 32 * (part + own), q_scale, b_stride,
                            min(TOKENS, rows - r), address(y) + 64 * (own * rows + r),
                        )  # fmt: skip
            for own in range(together):
                for r in range(rows):
                    put_row(out, r, start + own, address(y) + 64 * (own * rows + r), add)
        amx_end()
        return rows + 0 * memory[0]  # Numba frees an array after its last mention

    return body
