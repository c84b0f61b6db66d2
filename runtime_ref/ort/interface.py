"""onnxruntime's C interface as far as the operators need it: a table of functions by number, and the table of an operator.

Numbers and fields are those of include/onnxruntime/core/session/onnxruntime_c_api.h (`OrtApi`, `OrtCustomOp`), where both only ever grow at
the end. The version asked for is the first with everything below.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from tmexport.errors import UsageError

VERSION = 17  # of the interface: onnxruntime 1.17
INVALID_ARGUMENT = 2  # OrtErrorCode

# Places in OrtApi
CREATE_STATUS, GET_ERROR_MESSAGE, RELEASE_STATUS = 0, 2, 93
CREATE_DOMAIN, ADD_TO_DOMAIN, ADD_DOMAIN = 26, 27, 28
TENSOR_DATA, AS_TENSOR_INFO, DIMENSIONS_COUNT, DIMENSIONS, TENSOR_INFO = 51, 55, 61, 62, 65
ATTRIBUTE_INT, ATTRIBUTE_STRING, INPUT, OUTPUT = 86, 87, 90, 91
RELEASE_TYPE, RELEASE_TENSOR_INFO, INPUT_TYPE, CONSTANT_INPUT, PARALLEL_FOR = 98, 99, 234, 249, 274

FLOAT, UINT8, INT8 = 1, 2, 3  # ONNXTensorElementDataType
_DTYPES: dict[int, np.dtype[Any]] = {FLOAT: np.dtype(np.float32), UINT8: np.dtype(np.uint8), INT8: np.dtype(np.int8)}

_POINTER = ctypes.c_void_p
_CREATE = ctypes.CFUNCTYPE(_POINTER, _POINTER, _POINTER, _POINTER, ctypes.POINTER(_POINTER))
_OF_OP = ctypes.CFUNCTYPE(_POINTER, _POINTER)
_OF_INDEX = ctypes.CFUNCTYPE(ctypes.c_int, _POINTER, ctypes.c_size_t)


class OrtCustomOp(ctypes.Structure):
    """An operator as onnxruntime asks about it; what is not set is not called."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("create_kernel", _POINTER),
        ("name", _OF_OP),
        ("provider", _OF_OP),
        ("input_type", _OF_INDEX),
        ("input_count", _OF_OP),
        ("output_type", _OF_INDEX),
        ("output_count", _OF_OP),
        ("compute_1", _POINTER),
        ("destroy", _POINTER),
        ("input_characteristic", _OF_INDEX),
        ("output_characteristic", _OF_INDEX),
        ("input_memory", _OF_INDEX),
        ("variadic", _POINTER * 4),
        ("create", _CREATE),
        ("compute", _POINTER),
        ("infer_shapes", _POINTER),
        ("start_version", _POINTER),
        ("end_version", _POINTER),
        ("sharing", _POINTER * 4),
    )


def custom_op(
    name: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    create: Callable[[int, int], int],
    compute: int,
    destroy: int,
    on_error: Callable[[BaseException], None],
) -> OrtCustomOp:
    """The table of an operator.

    Args:
        name: without its domain.
        inputs: their element types.
        outputs: theirs.
        create: called with the addresses of the interface and of the node's OrtKernelInfo; returns the address of the kernel, which
            `compute` and `destroy` get. What it raises becomes onnxruntime's error.
        compute: address of KernelComputeV2's code.
        destroy: address of KernelDestroy's.
        on_error: is told what `create` raised.
    """
    told = ctypes.create_string_buffer(name.encode())

    def created(op: int, table: int, info: int, kernel: Any) -> int:
        try:
            kernel[0] = create(table, info)
        except BaseException as error:  # nothing can pass through onnxruntime
            on_error(error)
            return Api(table).status(f"{name}: {error or type(error).__name__}")
        return 0

    op = OrtCustomOp(
        version=VERSION,
        name=_OF_OP(lambda op: ctypes.addressof(told)),
        provider=_OF_OP(lambda op: 0),
        input_type=_OF_INDEX(lambda op, i: inputs[i]),
        input_count=_OF_OP(lambda op: len(inputs)),
        output_type=_OF_INDEX(lambda op, i: outputs[i]),
        output_count=_OF_OP(lambda op: len(outputs)),
        destroy=destroy,
        input_characteristic=_OF_INDEX(lambda op, i: 0),  # required
        output_characteristic=_OF_INDEX(lambda op, i: 0),
        input_memory=_OF_INDEX(lambda op, i: 0),
        create=_CREATE(created),
        compute=compute,
    )
    return op


class Api:
    """The functions of OrtApi that Python calls, while a session is made."""

    def __init__(self, table: int) -> None:
        self._table = table

    @classmethod
    def of(cls, base: int, version: int = VERSION) -> Api:
        """From the OrtApiBase that RegisterCustomOps gets.

        Raises:
            UsageError: this onnxruntime is too old.
        """
        get = ctypes.CFUNCTYPE(_POINTER, ctypes.c_uint32)(_POINTER.from_address(base).value or 0)
        table = get(version)
        if not table:
            raise UsageError(f"this onnxruntime is older than 1.{version}, whose interface the operators need")
        return cls(table)

    def function(self, number: int) -> int:
        """The address of a function."""
        return _POINTER.from_address(self._table + 8 * number).value or 0

    def call(self, number: int, *arguments: Any) -> None:
        """Call a function that returns a status.

        Raises:
            UsageError: with onnxruntime's message.
        """
        status = ctypes.CFUNCTYPE(_POINTER, *[_POINTER] * len(arguments))(self.function(number))(*arguments)
        if status:
            message = ctypes.CFUNCTYPE(ctypes.c_char_p, _POINTER)(self.function(GET_ERROR_MESSAGE))(status)
            self.release(RELEASE_STATUS, status)
            raise UsageError(message.decode(errors="replace"))

    def get(self, number: int, *arguments: Any) -> int:
        """Call a function whose last argument is where a word goes; returns that word."""
        found = ctypes.c_uint64()
        self.call(number, *arguments, ctypes.addressof(found))
        return found.value

    def release(self, number: int, thing: int) -> None:
        """Call one of the functions that free something."""
        ctypes.CFUNCTYPE(None, _POINTER)(self.function(number))(thing)

    def status(self, message: str) -> int:
        """A new OrtStatus."""
        create = ctypes.CFUNCTYPE(_POINTER, ctypes.c_int, ctypes.c_char_p)(self.function(CREATE_STATUS))
        return create(INVALID_ARGUMENT, message.encode(errors="replace")) or 0


class Node:
    """What a node of a graph says about itself when its kernel is made."""

    def __init__(self, api: Api, info: int) -> None:
        self.api, self._info = api, info

    def text(self, attribute: str) -> str:
        size = ctypes.c_size_t(256)
        room = ctypes.create_string_buffer(size.value)
        name = ctypes.create_string_buffer(attribute.encode())
        self.api.call(
            ATTRIBUTE_STRING, self._info, ctypes.addressof(name), ctypes.addressof(room), ctypes.addressof(size)
        )
        return room.value.decode()

    def number(self, attribute: str) -> int:
        name = ctypes.create_string_buffer(attribute.encode())
        return ctypes.c_int64(self.api.get(ATTRIBUTE_INT, self._info, ctypes.addressof(name))).value

    def constant(self, index: int, what: str, kind: int = FLOAT, rank: int | None = None) -> np.ndarray:
        """An input that is a weight, where onnxruntime has it: not to be written to, nor kept.

        Raises:
            UsageError: it is no constant, or of another rank.
        """
        value, known = ctypes.c_void_p(), ctypes.c_int()
        self.api.call(CONSTANT_INPUT, self._info, index, ctypes.addressof(known), ctypes.addressof(value))
        if not known.value:
            raise UsageError(
                f"{what} is no constant of the graph; expected a weight (with onnxruntime's graph optimisations on)"
            )
        info = self.api.get(TENSOR_INFO, value)
        shape = self._shape(info)
        self.api.release(RELEASE_TENSOR_INFO, info)
        if rank is not None and len(shape) != rank:
            raise UsageError(f"{what} has the shape {list(shape)}; expected {rank} dimensions")
        dtype = _DTYPES[kind]
        count = int(np.prod(shape, dtype=np.int64))
        if not count:
            return np.zeros(shape, dtype)
        data = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(self.api.get(TENSOR_DATA, value))
        return np.frombuffer(memoryview(data), dtype).reshape(shape)

    def shape(self, index: int) -> tuple[int, ...]:
        """Of an input, as far as the graph says: -1 for the rest."""
        kind = self.api.get(INPUT_TYPE, self._info, index)
        shape = self._shape(self.api.get(AS_TENSOR_INFO, kind))  # a part of the other
        self.api.release(RELEASE_TYPE, kind)
        return shape

    def _shape(self, info: int) -> tuple[int, ...]:
        found = (ctypes.c_int64 * self.api.get(DIMENSIONS_COUNT, info))()
        self.api.call(DIMENSIONS, info, ctypes.addressof(found), len(found))
        return tuple(found)
