"""NamedTuples of arrays and numbers as words of memory, for compiled functions that take their arguments by address.

A function so called has one signature whatever it reads, and its arrays are borrowed: nothing counts references to them. An
array is its address and its lengths, a number a word, a NamedTuple inside another its own words.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import numpy_support
from numba.np.arrayobj import make_array, populate_array

# ruff: noqa: ANN001, ANN201, ANN202 - the signature of an intrinsic is Numba's (typing context, types)

WORD = ir.IntType(64)


def words(record: Any) -> Iterator[int]:
    """The words of a NamedTuple of contiguous arrays, whole numbers, fp64 numbers and such NamedTuples.

    Whoever keeps the words keeps the arrays.

    Raises:
        TypeError: it holds anything else.
    """
    if isinstance(record, np.ndarray):
        if not record.flags.c_contiguous:
            raise TypeError("a kernel's array is not contiguous")
        yield record.ctypes.data
        yield from record.shape
    elif isinstance(record, tuple):
        for field in record:
            yield from words(field)
    elif isinstance(record, float):
        yield struct.unpack("<Q", struct.pack("<d", record))[0]
    elif isinstance(record, int | np.integer):
        yield int(record) % 2**64
    else:
        raise TypeError(f"a kernel's argument is a {type(record).__name__}")


def type_of(record: Any) -> types.Type:
    """The Numba type that `read` makes of such words."""
    if isinstance(record, np.ndarray):
        return types.Array(numpy_support.from_dtype(record.dtype), record.ndim, "C")
    if isinstance(record, tuple):
        fields = tuple(type_of(field) for field in record)
        if fields and all(field == fields[0] for field in fields):
            return types.NamedUniTuple(fields[0], len(fields), type(record))
        return types.NamedTuple(fields, type(record))
    return types.float64 if isinstance(record, float) else types.int64


@intrinsic
def read(typingctx, address, kind):
    """The record of Numba type `kind` whose words start at `address`."""
    record = kind.instance_type

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], WORD.as_pointer())
        index = 0

        def word() -> ir.Value:
            nonlocal index
            index += 1
            return builder.load(builder.gep(pointer, [ir.Constant(WORD, index - 1)]))

        def value(kind: Any) -> Any:
            if isinstance(kind, types.Array):
                return _array(context, builder, kind, word(), [word() for _ in range(kind.ndim)])
            if isinstance(kind, types.BaseTuple):
                return context.make_tuple(builder, kind, [value(field) for field in list(cast(Any, kind))])
            found = word()
            return builder.bitcast(found, ir.DoubleType()) if kind == types.float64 else found

        return value(record)

    return record(types.uint64, kind), codegen


@intrinsic
def floats_at(typingctx, address, count):
    """The `count` fp32 numbers at an address, as an array."""
    kind = types.Array(types.float32, 1, "C")

    def codegen(context, builder, sig, args):
        return _array(context, builder, kind, args[0], [args[1]])

    return kind(types.int64, types.int64), codegen


def _array(context, builder, kind: types.Array, address: ir.Value, lengths: list[ir.Value]) -> ir.Value:
    array = make_array(kind)(context, builder)
    size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    strides, following = [], ir.Constant(WORD, size)
    for length in reversed(lengths):
        strides.insert(0, following)
        following = builder.mul(following, length)
    populate_array(
        array,
        data=builder.inttoptr(address, array.data.type),
        shape=cgutils.pack_array(builder, lengths),
        strides=cgutils.pack_array(builder, strides),
        itemsize=ir.Constant(WORD, size),
        meminfo=None,
    )
    return array._getvalue()
