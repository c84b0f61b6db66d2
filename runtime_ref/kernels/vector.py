"""Vectors of 16 lanes as Numba values, so that elementwise kernels read like the specification.

    F32 (16 x fp32), F64 (16 x fp64), I32 (16 x int32); +, -, *, / and the functions below. LLVM splits them over the
    registers the CPU has; a lane is one of the specification's 16 strided lanes.

Nothing here checks bounds. Arrays must be contiguous along the axis read.
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

# ruff: noqa: ANN001, ANN201, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

LANES = 16
_ELEMENTS: dict[str, tuple[ir.Type, types.Type]] = {"f32": (ir.FloatType(), types.float32), "f64": (ir.DoubleType(), types.float64), "i32": (ir.IntType(32), types.int32)}  # fmt: skip


class VectorType(types.Type):
    """16 lanes of an element: f32, f64 or i32."""

    def __init__(self, element: str) -> None:
        self.element = element
        super().__init__(name=f"Vector16({element})")

    @property
    def llvm(self) -> ir.VectorType:
        return ir.VectorType(_ELEMENTS[self.element][0], LANES)

    @property
    def scalar(self) -> types.Type:
        return _ELEMENTS[self.element][1]


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


F32, F64, I32 = VectorType("f32"), VectorType("f64"), VectorType("i32")


def _operator(function, float_name: str, int_name: Any) -> None:
    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and isinstance(args[0], VectorType) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    infer_global(function)(Template)

    @lower_builtin(function, VectorType, VectorType)
    def lower(context, builder, sig, args):
        name = int_name if sig.return_type.element == "i32" else float_name
        return getattr(builder, name)(*args)


for _function, _float_name, _int_name in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None),
):
    _operator(_function, _float_name, _int_name)


def splatted(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector with `scalar` in every lane."""
    vector = builder.insert_element(
        ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
    )
    mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(vector, vector, mask)


@intrinsic
def splat(typingctx, scalar):
    """The scalar (float32, float64, int32) in all 16 lanes."""
    result = {types.float32: F32, types.float64: F64, types.int32: I32}[scalar]

    def codegen(context, builder, sig, args):
        return splatted(builder, args[0], LANES)

    return result(scalar), codegen


def _place(context, builder, sig, args, stored: ir.Type):
    array = context.make_array(sig.args[0])(context, builder, args[0])
    element = builder.gep(array.data, [args[1]])
    return builder.bitcast(element, ir.VectorType(stored, LANES).as_pointer())


@intrinsic
def load(typingctx, array, index):
    """16 consecutive elements of a 1-d array from `index`: float32 and int32 as they are, uint16 as fp16 made fp32."""
    if array.dtype not in (types.float32, types.uint16, types.int32):
        return None
    result = I32 if array.dtype == types.int32 else F32

    def codegen(context, builder, sig, args):
        if array.dtype == types.uint16:
            half = builder.load(_place(context, builder, sig, args, ir.HalfType()), align=2)
            return builder.fpext(half, F32.llvm)
        return builder.load(_place(context, builder, sig, args, result.llvm.element), align=4)

    return result(array, types.int64), codegen


@intrinsic
def store(typingctx, array, index, vector):
    """Write 16 lanes: fp32 into float32 or, rounded to fp16, into uint16; int32 into int16 or int8 by truncation."""
    target = {types.float32: ir.FloatType(), types.uint16: ir.HalfType(), types.int16: ir.IntType(16), types.int8: ir.IntType(8)}[array.dtype]  # fmt: skip

    def codegen(context, builder, sig, args):
        value = args[2]
        if isinstance(target, ir.HalfType):
            value = builder.fptrunc(value, ir.VectorType(target, LANES))
        elif isinstance(target, ir.IntType):
            value = builder.trunc(value, ir.VectorType(target, LANES))
        pointer = _place(context, builder, sig, args, target)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), codegen


def _at(builder, address, stored: ir.Type):
    return builder.inttoptr(address, ir.VectorType(stored, LANES).as_pointer())


@intrinsic
def peek(typingctx, address):
    """16 consecutive fp32 from an address."""

    def codegen(context, builder, sig, args):
        return builder.load(_at(builder, args[0], ir.FloatType()), align=4)

    return F32(types.int64), codegen


@intrinsic
def poke(typingctx, address, vector):
    """Write 16 fp32 to an address."""

    def codegen(context, builder, sig, args):
        builder.store(args[1], _at(builder, args[0], ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, F32), codegen


def ask_for_line(builder: ir.IRBuilder, pointer: ir.Value, level: int = 1) -> None:
    """A prefetch for reading, into the cache of this level and those behind it; one past the end of an array is harmless."""
    i32, name = ir.IntType(32), "llvm.prefetch.p0"
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), i32, i32, i32])
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [pointer, ir.Constant(i32, 0), ir.Constant(i32, 4 - level), ir.Constant(i32, 1)])


@intrinsic
def ask_for(typingctx, address):
    """`ask_for_line` of the second level."""

    def codegen(context, builder, sig, args):
        ask_for_line(builder, builder.inttoptr(args[0], ir.IntType(8).as_pointer()), level=2)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def widen(typingctx, vector):
    """F32 as F64; exact."""
    return F64(F32), lambda context, builder, sig, args: builder.fpext(args[0], F64.llvm)


@intrinsic
def bits(typingctx, vector):
    """F32 as the I32 with the same bits."""
    return I32(F32), lambda context, builder, sig, args: builder.bitcast(args[0], I32.llvm)


@intrinsic
def floats(typingctx, vector):
    """I32 as the F32 with the same bits."""
    return F32(I32), lambda context, builder, sig, args: builder.bitcast(args[0], F32.llvm)


@intrinsic
def clamp_below(typingctx, vector, bound):
    """Lanes below `bound` replaced by it; NaN stays."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[1], args[0])

    return F32(F32, F32), codegen


@intrinsic
def clamp_above(typingctx, vector, bound):
    """Lanes above `bound` replaced by it; NaN stays."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[1], args[0])

    return F32(F32, F32), codegen


@intrinsic
def both(typingctx, a, b):
    """Bitwise and of two I32."""
    return I32(I32, I32), lambda context, builder, sig, args: builder.and_(*args)


@intrinsic
def larger(typingctx, a, b):
    """Lane-wise maximum of two I32."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.icmp_signed(">", *args), *args)

    return I32(I32, I32), codegen


@intrinsic
def shift_left(typingctx, a, count):
    return I32(I32, I32), lambda context, builder, sig, args: builder.shl(*args)


@intrinsic
def shift_right(typingctx, a, count):
    """Arithmetic: the sign is kept."""
    return I32(I32, I32), lambda context, builder, sig, args: builder.ashr(*args)


def tree_of(builder: ir.IRBuilder, vector: ir.Value, combine) -> ir.Value:
    """Combine 16 lanes by the specification's tree: lane i with lane i + 8, then + 4, + 2, + 1."""
    for half in (8, 4, 2, 1):
        low, high = (ir.Constant(ir.VectorType(ir.IntType(32), half), list(range(at, at + half))) for at in (0, half))
        vector = combine(builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high))
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


@intrinsic
def tree_sum(typingctx, vector):
    """The sum of the 16 lanes, in the fixed order; a scalar."""

    def codegen(context, builder, sig, args):
        combine = builder.add if vector.element == "i32" else builder.fadd
        return tree_of(builder, args[0], combine)

    return vector.scalar(vector), codegen


@intrinsic
def tree_sums(typingctx, array):
    """`tree_sum` of 16 vectors stored one after the other in a float32 array [256]; lane c is the sum of vector c.

    Vectors are folded in pairs, so that every addition does 16 lanes of work; each sum is still the specification's tree.
    """

    def codegen(context, builder, sig, args):
        base = _place(context, builder, sig, [args[0], ir.Constant(ir.IntType(64), 0)], ir.FloatType())
        vectors = [builder.load(builder.gep(base, [ir.Constant(ir.IntType(64), c)]), align=4) for c in range(LANES)]
        half = LANES // 2
        while len(vectors) > 1:
            # a vector holds LANES / (2 half) sums of 2 half lanes each; lane numbers beyond 15 are the second vector's
            starts = range(0, 2 * LANES, 2 * half)
            low, high = (
                ir.Constant(ir.VectorType(ir.IntType(32), LANES), [s + at + j for s in starts for j in range(half)])
                for at in (0, half)
            )
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [
                builder.fadd(builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)) for a, b in pairs
            ]
            half //= 2
        return vectors[0]

    return F32(array), codegen


@intrinsic
def transpose(typingctx, source, source_row, target, target_row):
    """16 x 16 fp32 from one address to another with rows and columns exchanged; the rows lie so many bytes apart."""

    def codegen(context, builder, sig, args):
        def place(address, row, i):
            at = builder.add(address, builder.mul(row, ir.Constant(ir.IntType(64), i)))
            return _at(builder, at, ir.FloatType())

        rows = [builder.load(place(args[0], args[1], i), align=4) for i in range(LANES)]
        half = LANES // 2
        while half:  # blocks off the diagonal change places: of 8 x 8, then of 4 x 4, ...
            low, high = (
                _mask(j + at if not j & half else LANES + j - half + at for j in range(LANES)) for at in (0, half)
            )
            turned = list(rows)
            for i in (i for i in range(LANES) if not i & half):
                turned[i] = builder.shuffle_vector(rows[i], rows[i + half], low)
                turned[i + half] = builder.shuffle_vector(rows[i], rows[i + half], high)
            rows, half = turned, half // 2
        for i, row in enumerate(rows):
            builder.store(row, place(args[2], args[3], i), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


def _mask(lanes) -> ir.Constant:
    lanes = list(lanes)
    return ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)


def _joined(builder, parts):
    """Three vectors as two of 32 lanes, whose lanes a shuffle counts from 0 to 47."""
    return builder.shuffle_vector(*parts[:2], _mask(range(32))), builder.shuffle_vector(
        parts[2], parts[2], _mask(range(32))
    )


@intrinsic
def part_threes(typingctx, source, target, row):
    """16 threes of fp32 -> the firsts, the seconds and the thirds, `row` bytes apart."""

    def codegen(context, builder, sig, args):
        places = [builder.add(args[0], ir.Constant(ir.IntType(64), 4 * LANES * i)) for i in range(3)]
        joined = _joined(builder, [builder.load(_at(builder, place, ir.FloatType()), align=4) for place in places])
        for i in range(3):
            place = builder.add(args[1], builder.mul(args[2], ir.Constant(ir.IntType(64), i)))
            picked = builder.shuffle_vector(*joined, _mask(3 * j + i for j in range(LANES)))
            builder.store(picked, _at(builder, place, ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def join_threes(typingctx, source, row, target):
    """What `part_threes` parted."""

    def codegen(context, builder, sig, args):
        places = [builder.add(args[0], builder.mul(args[1], ir.Constant(ir.IntType(64), i))) for i in range(3)]
        joined = _joined(builder, [builder.load(_at(builder, place, ir.FloatType()), align=4) for place in places])
        for i in range(3):
            place = builder.add(args[2], ir.Constant(ir.IntType(64), 4 * LANES * i))
            mask = _mask(16 * (m % 3) + m // 3 for m in range(LANES * i, LANES * i + LANES))
            builder.store(builder.shuffle_vector(*joined, mask), _at(builder, place, ir.FloatType()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def largest(typingctx, vector):
    """The largest lane of an I32 or an F32."""

    def codegen(context, builder, sig, args):
        compare = builder.icmp_signed if vector.element == "i32" else builder.fcmp_ordered
        return tree_of(builder, args[0], lambda a, b: builder.select(compare(">", a, b), a, b))

    return vector.scalar(vector), codegen


@intrinsic
def only_from(typingctx, vector, lane, other):
    """An F32 whose lanes before number `lane` (an int32) are replaced by the scalar `other`."""

    def codegen(context, builder, sig, args):
        numbers = ir.Constant(I32.llvm, list(range(LANES)))
        beyond = builder.icmp_signed(">=", numbers, splatted(builder, args[1], LANES))
        return builder.select(beyond, args[0], splatted(builder, args[2], LANES))

    return F32(F32, types.int32, types.float32), codegen


@intrinsic
def address(typingctx, array):
    """Where an array's data begins."""

    def codegen(context, builder, sig, args):
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, cgutils.intp_t)

    return types.int64(array), codegen
