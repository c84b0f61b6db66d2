"""The few machine operations Numba has no word for: fp16 conversion, bit casts, raw pointers, atomics."""

from __future__ import annotations

import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# ruff: noqa: ANN001, ANN201, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

I8, I16, I32, I64, HALF, F32 = (
    ir.IntType(8),
    ir.IntType(16),
    ir.IntType(32),
    ir.IntType(64),
    ir.HalfType(),
    ir.FloatType(),
)


@intrinsic
def half_to_float(typingctx, bits):
    """fp32 of the fp16 whose bits are a uint16; exact."""

    def codegen(context, builder, sig, args):
        return builder.fpext(builder.bitcast(args[0], HALF), F32)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, value):
    """Bits (uint16) of the fp32 rounded to fp16, halves to even."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.fptrunc(args[0], HALF), I16)

    return types.uint16(types.float32), codegen


@intrinsic
def float_bits(typingctx, value):
    """The int32 with the bits of an fp32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), codegen


@intrinsic
def bits_float(typingctx, bits):
    """The fp32 with the bits of an int32."""

    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], F32)

    return types.float32(types.int32), codegen


def _pointer(element: types.Type) -> Any:
    @intrinsic
    def as_pointer(typingctx, address):
        def codegen(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return types.CPointer(element)(types.uint64), codegen

    return as_pointer


# Gives the core to another thread: what a barrier does when there are more threads than cores.
sched_yield = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())

pointer_f32 = _pointer(types.float32)
pointer_u16 = _pointer(types.uint16)


@intrinsic
def atomic_add(typingctx, array, index, value):
    """Add to an int64 array element, sequentially consistent; returns the old value."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _element(context, builder, sig, args), args[2], "seq_cst")

    return types.int64(array, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, array, index):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(_element(context, builder, sig, args), "seq_cst", 8)

    return types.int64(array, types.int64), codegen


@intrinsic
def atomic_store(typingctx, array, index, value):
    def codegen(context, builder, sig, args):
        builder.store_atomic(args[2], _element(context, builder, sig, args), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


def _element(context, builder, sig, args):
    array = context.make_array(sig.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])
