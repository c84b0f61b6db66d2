"""How kernels are compiled: `kernel` for functions that only other compiled functions call, `stack` for their small arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.extending import overload as numba_overload

from runtime_ref.kernels.linking import Part

# ruff: noqa: ANN001, ANN201, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

# No wrappers for Python and C, which cost a quarter of the time to compile; no counted references: arrays are borrowed.
OPTIONS: dict[str, Any] = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "error_model": "numpy",
    "_nrt": False,
}

# A factory of compiled functions: one for each instruction set, number format, ...; NamedTuples of two classes may be equal
made_for = lru_cache(maxsize=None, typed=True)
kernel = njit(**OPTIONS, pipeline_class=Part)
inlined = njit(inline="always", **OPTIONS, pipeline_class=Part)


def overload(function: Any, allocates: bool = False) -> Any:
    """numba.extending.overload, compiled as a kernel; `allocates`: it makes arrays of its own."""
    return numba_overload(function, jit_options=cast(Any, OPTIONS | {"_nrt": allocates, "pipeline_class": Part}))


@intrinsic(prefer_literal=True)
def stack(typingctx, size):
    """The address of `size` (a constant) bytes on a cache line, until the function returns."""
    if not isinstance(size, types.IntegerLiteral):
        return None
    count = size.literal_value

    def codegen(context, builder, sig, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(ir.IntType(8), count))
            room.align = 64
        return builder.ptrtoint(room, ir.IntType(64))

    return types.int64(size), codegen
