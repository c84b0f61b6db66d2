"""NamedTuples of arrays and numbers as words of memory, for compiled functions that take their arguments by address.

A function so called has one signature whatever it reads, and its arrays are borrowed: nothing counts references to them. An
array is its address and its lengths, a number a word, a NamedTuple inside another its own words.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model
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


class Record(types.Type):
    """The words of a NamedTuple, by their address: a field is read where it is used."""

    def __init__(self, instance_class: type, fields: tuple[types.Type, ...]) -> None:
        self.instance_class = instance_class
        self.fields: dict[str, types.Type] = dict(zip(cast(Any, instance_class)._fields, fields, strict=True))
        told = f"{instance_class.__module__}.{instance_class.__qualname__} {self.fields}"
        super().__init__(name=f"{instance_class.__name__}_{hashlib.sha256(told.encode()).hexdigest()[:16]}")

    def first_word(self, field: str) -> int:
        """Of a field, counted from the record's."""
        return sum(map(_size, list(self.fields.values())[: list(self.fields).index(field)]))


def _size(kind: types.Type) -> int:
    if isinstance(kind, Record):
        return sum(map(_size, kind.fields.values()))
    return 1 + kind.ndim if isinstance(kind, types.Array) else 1


@register_model(Record)
class _RecordModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, WORD)


@infer_getattr
class _RecordFields(AttributeTemplate):
    key = Record

    def generic_resolve(self, typ, attr):  # type: ignore[override]
        return typ.fields.get(attr)


@lower_getattr_generic(Record)
def _field(context, builder, typ, value, attr):
    kind = typ.fields[attr]
    place = builder.add(value, ir.Constant(WORD, 8 * typ.first_word(attr)))
    if isinstance(kind, Record):
        return place
    pointer = builder.inttoptr(place, WORD.as_pointer())
    found = [_word(builder, pointer, i) for i in range(_size(kind))]
    if isinstance(kind, types.Array):
        return _array(context, builder, kind, found[0], found[1:])
    return builder.bitcast(found[0], ir.DoubleType()) if kind == types.float64 else found[0]


def _word(builder: ir.IRBuilder, pointer: ir.Value, index: int) -> ir.Value:
    """A word that nobody writes while compiled code runs: LLVM may read it once, before a loop."""
    word = builder.load(builder.gep(pointer, [ir.Constant(WORD, index)]))
    word.set_metadata("invariant.load", builder.module.add_metadata([]))
    return word


def type_of(record: Any) -> types.Type:
    """The Numba type of what `read` makes of a record's words."""
    if isinstance(record, np.ndarray):
        return types.Array(numpy_support.from_dtype(record.dtype), record.ndim, "C")
    if isinstance(record, tuple):
        return Record(type(record), tuple(type_of(field) for field in record))
    return types.float64 if isinstance(record, float) else types.int64


@intrinsic
def read(typingctx, address, kind):
    """The record of Numba type `kind` whose words start at `address`."""
    return kind.instance_type(types.uint64, kind), lambda context, builder, sig, args: args[0]


@intrinsic
def floats_at(typingctx, address, count):
    """The `count` fp32 numbers at an address, as an array."""
    kind = types.Array(types.float32, 1, "C")

    def codegen(context, builder, sig, args):
        return _array(context, builder, kind, args[0], [args[1]])

    return kind(types.int64, types.int64), codegen


@intrinsic
def words_at(typingctx, address, count):
    """The `count` int64 numbers at an address, as an array."""
    kind = types.Array(types.int64, 1, "C")

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
