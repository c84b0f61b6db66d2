"""Elements of a recurrent state, 16 at an address, in each number format (`runtime_ref.arithmetic`)."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from runtime_ref.arithmetic import Fp16, Fp32
from runtime_ref.kernels.tiles import F32, HALF, Code
from runtime_ref.kernels.vector import F32 as VECTOR
from runtime_ref.kernels.vector import LANES

# ruff: noqa: ANN001, ANN201, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

STORED = {Fp32: F32, Fp16: HALF}


@intrinsic
def load_state(typingctx, kept_as, address):
    """16 elements as fp32."""
    stored = STORED[kept_as.instance_class]

    def codegen(context, builder, sig, args):
        code = Code(builder)
        value = code.load(code.pointer(args[1]), ir.VectorType(stored, LANES), 2)
        return value if stored is F32 else builder.fpext(value, VECTOR.llvm)

    return VECTOR(kept_as, types.int64), codegen


@intrinsic
def store_state(typingctx, kept_as, address, vector):
    """16 elements, rounded to the format."""
    stored = STORED[kept_as.instance_class]

    def codegen(context, builder, sig, args):
        code, value = Code(builder), args[2]
        value = value if stored is F32 else builder.fptrunc(value, ir.VectorType(stored, LANES))
        code.store(value, code.pointer(args[1]), 2)
        return context.get_dummy_value()

    return types.void(kept_as, types.int64, VECTOR), codegen
