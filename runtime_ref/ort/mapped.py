"""An ONNX file for a session that maps its weights instead of copying them.

onnxruntime reads a file as one protobuf message, weights and all, and then copies them. But a weight may also lie in another file, at an
offset, and is then mapped into memory. Here the other file is the same one: the session gets the graph without the bytes of its
large weights, and for each the place in the file where they are. Field numbers are onnx.proto's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tmexport.onnx.wire import LENGTH_DELIMITED, tag, varint

LEAST = 1 << 16  # bytes of a weight that is worth a mapping of its own
_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, of GraphProto
_RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 9, 13, 14  # of TensorProto
_KEY, _VALUE, _EXTERNAL = 1, 2, 1  # of StringStringEntryProto; of DataLocation
_FIXED = {1: 8, 5: 4}  # bytes of the wire types without one


def release(array: np.ndarray) -> None:
    """Give the memory of an array back to the system if a file is mapped there: who reads it again reads the file."""
    start, end = array.ctypes.data, array.ctypes.data + array.nbytes
    with contextlib.suppress(OSError):  # no /proc: it stays
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            place, _, _, _, inode, *_ = line.split()
            low, high = (int(address, 16) for address in place.split("-"))
            if low <= start and end <= high and inode != "0":
                first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
                if first < last:
                    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


class _Field(NamedTuple):
    """number; start: of its tag; first, end: of its content."""

    number: int
    start: int
    first: int
    end: int


def without_weights(path: Path) -> bytes:
    """The model in a file whose large weights lie outside: in the file of this name.

    Raises:
        ValueError: it is no protobuf message.
        OSError: it cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = bytearray()
        for field in _fields(data, 0, len(data)):
            if field.number == _GRAPH:
                model += _field(_GRAPH, _graph(data, field, path.name))
            else:
                model += data[field.start : field.end]
    return bytes(model)


def _graph(data: mmap.mmap, graph: _Field, name: str) -> bytes:
    out = bytearray()
    for field in _fields(data, graph.first, graph.end):
        large = field.number == _INITIALIZER and field.end - field.first >= LEAST
        out += _field(_INITIALIZER, _tensor(data, field, name)) if large else data[field.start : field.end]
    return bytes(out)


def _tensor(data: mmap.mmap, tensor: _Field, name: str) -> bytes:
    out = bytearray()
    for field in _fields(data, tensor.first, tensor.end):
        if field.number != _RAW_DATA or field.end - field.first < LEAST:
            out += data[field.start : field.end]
            continue
        place = {"location": name, "offset": field.first, "length": field.end - field.first}
        for key, value in place.items():
            entry = _field(_KEY, key.encode()) + _field(_VALUE, str(value).encode())
            out += _field(_EXTERNAL_DATA, entry)
        out += varint(_DATA_LOCATION << 3) + varint(_EXTERNAL)
    return bytes(out)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[_Field]:
    """The fields of the message between two places."""
    while at < end:
        start = at
        key, at = _read_varint(data, at, end)
        kind = key & 7
        if kind == LENGTH_DELIMITED:
            length, at = _read_varint(data, at, end)
            first = at
            at += length
        elif kind == 0:
            first = at
            _, at = _read_varint(data, at, end)
        elif kind in _FIXED:
            first = at
            at += _FIXED[kind]
        else:
            raise ValueError(f"a field of wire type {kind} at byte {start}")
        if at > end:
            raise ValueError(f"a field at byte {start} ends behind its message")
        yield _Field(key >> 3, start, first, at)


def _read_varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"no number at byte {at}")


def _field(number: int, content: bytes) -> bytes:
    return tag(number, len(content)) + content
