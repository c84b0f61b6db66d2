"""Recurrent states in each number format (`runtime_ref.arithmetic`): 16 elements at an address, and what a token does to rows.

Arithmetic happens in a row's unit: 1, except where the format keeps a scale for every row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.arithmetic import LEVELS, PER_LEVEL, REFRESH, TINY, Fp16, Fp32, Int8Rows
from runtime_ref.kernels.compiled import overload
from runtime_ref.kernels.intrinsics import bits_float
from runtime_ref.kernels.math import ABS_BITS, MAGIC, MAGIC_BITS, largest_bits, vector_exp
from runtime_ref.kernels.tiles import F32, HALF, I8, I32, Code, V
from runtime_ref.kernels.vector import F32 as VECTOR
from runtime_ref.kernels.vector import (
    LANES,
    bits,
    both,
    clamp_above,
    floats,
    load,
    peek,
    poke,
    splat,
    tree_of,
)

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

_INTS, _FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)
ZERO, ONE = np.float32(0.0), np.float32(1.0)
AREA = 4 * 64  # bytes: what 16 rows need between the functions below, four vectors
# Where in it: the rows' unit, the one before, the new one's inverse, the largest code.
UNIT, OLD, INVERSE, TOP = 0, 64, 128, 192


@dataclass(frozen=True)
class Format:
    """16 elements as they lie in memory (`stored`) and in registers between tokens (`carried`)."""

    stored: ir.Type
    carried: ir.Type

    @property
    def width(self) -> int:
        return 4 if self.stored is F32 else 2 if self.stored is HALF else 1

    def load(self, code: Code, place: V) -> V:
        """From memory into registers."""
        value = code.load(place, ir.VectorType(self.stored, LANES), self.width)
        if self.stored is I8:
            return code.b.bitcast(code.b.add(code.b.sext(value, _INTS), _constant(I32, int(MAGIC_BITS))), _FLOATS)
        return value

    def opened(self, b: ir.IRBuilder, value: V) -> V:
        """As fp32, in the row's unit."""
        if self.stored is I8:
            return b.fsub(value, _constant(F32, float(MAGIC)))
        return value if self.stored is F32 else b.fpext(value, _FLOATS)

    def rounded(self, b: ir.IRBuilder, value: V) -> V:
        """From fp32, rounded to the format."""
        if self.stored is I8:
            return b.fadd(value, _constant(F32, float(MAGIC)))
        return value if self.stored is F32 else b.fptrunc(value, ir.VectorType(HALF, LANES))

    def store(self, code: Code, value: V, place: V) -> None:
        """From registers into memory."""
        if self.stored is I8:
            value = code.b.trunc(code.b.bitcast(value, _INTS), ir.VectorType(I8, LANES))
        code.store(value, place, self.width)


FORMATS = {Fp32: Format(F32, F32), Fp16: Format(HALF, HALF), Int8Rows: Format(I8, F32)}


def _constant(element: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(ir.VectorType(element, LANES), [value] * LANES)


@intrinsic
def load_state(typingctx, kept_as, address):
    """16 elements as fp32."""
    form = FORMATS[kept_as.instance_class]

    def codegen(context, builder, sig, args):
        code = Code(builder)
        return form.opened(builder, form.load(code, code.pointer(args[1])))

    return VECTOR(kept_as, types.int64), codegen


@intrinsic
def store_state(typingctx, kept_as, address, vector):
    """16 elements, rounded to the format."""
    form = FORMATS[kept_as.instance_class]

    def codegen(context, builder, sig, args):
        code = Code(builder)
        form.store(code, form.rounded(builder, args[2]), code.pointer(args[1]))
        return context.get_dummy_value()

    return types.void(kept_as, types.int64, VECTOR), codegen


def begin_rows(kept_as, area, states, scales, elements, position):
    """16 rows of `elements` elements each before the token at `position`, from the addresses of their elements and scales."""


def advance_rows(kept_as, area, slowest, step, top_b):
    """A token comes: `step` in the rows' new unit. slowest: the largest decay of each row; top_b: the largest |b|."""


def faded(kept_as, decay, old, inverse):
    """The factor from what is stored to the new unit, for a decay and the `OLD` and `INVERSE` of its rows."""


def in_unit(kept_as, value, unit):
    """A value in a row's unit as a number."""


def end_rows(kept_as, area, scales):
    """Keep the rows' unit."""


@overload(begin_rows)
def _begin(kept_as, area, states, scales, elements, position):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, area, states, scales, elements, position: None

    def begin(kept_as, area, states, scales, elements, position):
        unit, top = peek(scales), splat(LEVELS)
        if position % REFRESH == 0:
            for row in range(LANES):
                set_float(area + TOP + 4 * row, largest_code(states + row * elements, elements))
            top = peek(area + TOP)
            unit = unit * clamp_above(top, splat(ONE))  # nothing is there, in any unit
        poke(area + UNIT, unit)
        poke(area + TOP, top)

    return begin


@overload(advance_rows)
def _advance(kept_as, area, slowest, step, top_b):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, area, slowest, step, top_b: step

    def advance(kept_as, area, slowest, step, top_b):
        unit = peek(area + UNIT)
        if top_b < TINY:
            step = splat(ZERO)
        bound = (unit * peek(area + TOP)) * slowest + floats(both(bits(step), splat(ABS_BITS))) * splat(top_b)
        inverse = inverse_of(bound)
        poke(area + OLD, unit)
        poke(area + UNIT, unit_of(bound))
        poke(area + INVERSE, inverse)
        poke(area + TOP, splat(LEVELS))
        return step * inverse

    return advance


@overload(faded)
def _faded(kept_as, decay, old, inverse):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, decay, old, inverse: decay
    return lambda kept_as, decay, old, inverse: (old * decay) * inverse


@overload(in_unit)
def _in_unit(kept_as, value, unit):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, value, unit: value
    return lambda kept_as, value, unit: value * unit


@overload(end_rows)
def _end(kept_as, area, scales):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, area, scales: None
    return lambda kept_as, area, scales: poke(scales, peek(area + UNIT))


def _of_bound(small: float, broken: float, otherwise):
    """An intrinsic: of a bound's 16 lanes, by whether it is below TINY, not finite, or neither."""

    @intrinsic
    def function(typingctx, bound):
        def codegen(context, b, sig, args):
            pattern = b.bitcast(args[0], _INTS)
            tiny = b.icmp_unsigned("<", pattern, _constant(I32, int(TINY.view(np.int32))))
            bad = b.icmp_unsigned(">=", pattern, _constant(I32, 0x7F800000))
            value = b.select(bad, _constant(F32, broken), otherwise(b, args[0]))
            return b.select(tiny, _constant(F32, small), value)

        return VECTOR(VECTOR), codegen

    return function


inverse_of = _of_bound(0.0, 0.0, lambda b, bound: b.fdiv(_constant(F32, float(LEVELS)), bound))
unit_of = _of_bound(0.0, float("nan"), lambda b, bound: b.fmul(bound, _constant(F32, float(PER_LEVEL))))


@intrinsic
def largest_code(typingctx, address, count):
    """The largest |code| of `count` (a multiple of 16) int8, as an fp32."""

    def codegen(context, b, sig, args):
        code, kind = Code(b), ir.VectorType(I8, LANES)
        start, zero = code.pointer(args[0]), ir.Constant(kind, None)

        def more(i, values):
            value = code.load(code.at(start, b.mul(i, code.i64(LANES))), kind, 1)
            size = b.select(b.icmp_signed("<", value, zero), b.sub(zero, value), value)
            return [b.select(b.icmp_signed(">", size, values[0]), size, values[0])]

        (lanes,) = code.loop(b.sdiv(args[1], code.i64(LANES)), [zero], more)
        top = tree_of(b, lanes, lambda x, y: b.select(b.icmp_signed(">", x, y), x, y))
        return b.sitofp(top, F32)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def set_float(typingctx, address, value):
    """Write an fp32 to an address."""

    def codegen(context, b, sig, args):
        code = Code(b)
        code.store(args[1], code.pointer(args[0]))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


def top_of(kept_as, row, start, count):
    """The largest |x| of `count` values (a multiple of 16) of an fp32 row, by bit patterns, if the format needs it."""


@overload(top_of)
def _top_of(kept_as, row, start, count):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, row, start, count: ZERO

    return lambda kept_as, row, start, count: bits_float(largest_bits(row, start, start + count))


def slowest_of(kept_as, dt, rates, base):
    """exp(dt * rate) of 16 rows, if the format needs it."""


@overload(slowest_of)
def _slowest_of(kept_as, dt, rates, base):
    if kept_as.instance_class is not Int8Rows:
        return lambda kept_as, dt, rates, base: dt
    return lambda kept_as, dt, rates, base: vector_exp(dt * load(rates, base))


def scales_after(kept_as) -> int:
    """How many arrays after the elements' the rows' scales are; 0: there are none."""
    return len(kept_as.arrays("", (1, 1))) - 1
