"""Reading GGUF (versions 2 and 3) from an untrusted file (specification: ggml/docs/gguf.md).

Nothing is allocated on the word of the file: every count and length is checked against the bytes that are left first.
The data stays in a read-only memory map.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.errors import GGUFError
from tmexport.files import named_by_its_start
from tmexport.gguf.kinds import is_part, wrong_kinds
from tmexport.types import GGMLType

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAGIC, _BEFORE = b"GGUF", (b"lmgg", b"fmgg", b"tjgg", b"algg")  # ggml, ggmf, ggjt, ggla
_SMALLEST = 24  # bytes of a header that declares nothing
_MAX_NAME = 2**16
_MAX_DIMENSIONS = 4
# A model has some 30 keys and 9 tensors a layer. Small ones cost a Python object of 10 times their size, so their number is
# bounded: whatever the file says, opening it takes less than its own size in memory, and 16 MB.
_MAX_KEYS, _MAX_TENSORS = 4096, 16384
_SMALLEST_KEY = 8 + 4 + 1  # an empty key, its type, a value of a byte
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: numpy-order shape (rows first), type, absolute offset and size in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


class StoredArray(Sequence[Any]):
    """An array value; its items are decoded when asked for, because a list would take several times the file's bytes."""

    def __init__(self, count: int, item: Callable[[int], Any]) -> None:
        self._count, self._item = count, item

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._item(index % self._count)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | StoredArray) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if self._count > 4 else ""
        return f"[{', '.join(map(repr, self[:4]))}{more}]"


@dataclass(frozen=True)
class GGUFFile:
    """A validated GGUF file: metadata by key (arrays as `StoredArray`), tensors by name in file order, the mapped bytes."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: np.ndarray

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor as rows: uint8 [n, row_bytes], a read-only view of the map.

        Raises:
            GGUFError: there is no such tensor.
        """
        if name not in self.tensors:
            raise GGUFError(f"{self.path}: has no tensor {name}; it is not a complete Mamba-2 model")
        info = self.tensors[name]
        row_bytes = info.type.row_bytes(info.shape[-1])
        return self.data[info.offset : info.offset + info.nbytes].reshape(-1, row_bytes)


class Cursor:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, data: np.ndarray) -> None:
        self.view = data.data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.view) - self.at

    def take(self, count: int, what: str) -> memoryview:
        if count > self.left:
            raise GGUFError(
                f"ends at byte {len(self.view)} inside {what} (byte {self.at}); the file is truncated or damaged"
            )
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, code: str, what: str) -> Any:
        value = self.take(struct.calcsize("<" + code), what)
        if code == "?":
            if value[0] > 1:
                raise GGUFError(f"{what} at byte {self.at - 1} is {value[0]}; expected a boolean, 0 or 1")
            return bool(value[0])
        return struct.unpack("<" + code, value)[0]

    def string(self, what: str, longest: int | None = None) -> str:
        start, length = self.at, self.number("Q", what)
        if longest is not None and length > longest:
            raise GGUFError(f"{what} at byte {start} claims {length} bytes; expected at most {longest}")
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise GGUFError(f"{what} at byte {start} is not UTF-8") from None


def open_gguf(path: Path | str) -> GGUFFile:
    """Open and validate a GGUF file.

    Raises:
        GGUFError: the file is missing, or anything in it contradicts the format; the offset or the tensor is named.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise GGUFError(f"{path}: is not a file; expected a GGUF file")
        data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        metadata, tensors = _parse(Cursor(data), size)
    except GGUFError as error:
        found = None if bytes(data[:4]) == _MAGIC else named_by_its_start(bytes(data[:512]))
        raise GGUFError(f"{path}: {found or error}") from None
    return GGUFFile(path, metadata, tensors, data)


def read_version(cursor: Cursor) -> int:
    """The version of a file, after its magic.

    Raises:
        GGUFError: it is no GGUF, or one of another version or byte order.
    """
    if cursor.left < _SMALLEST:
        raise GGUFError(f"has {cursor.left} bytes; a GGUF header needs at least {_SMALLEST}")
    magic = bytes(cursor.take(4, "the magic"))
    if magic in _BEFORE:
        raise GGUFError("is in a format of llama.cpp from before GGUF; convert the model again")
    if magic != _MAGIC:
        raise GGUFError(f"starts with {magic!r}; expected {_MAGIC!r}")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in (2, 3):
            raise GGUFError(
                "is a big-endian GGUF file; expected little-endian (convert it on the machine that wrote it)"
            )
        raise GGUFError(f"is GGUF version {version}; expected 2 or 3")
    return version


def _parse(cursor: Cursor, size: int) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    read_version(cursor)
    n_tensors, n_keys = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
    if n_tensors * _SMALLEST_TENSOR + n_keys * _SMALLEST_KEY > cursor.left:
        raise GGUFError(f"promises {n_tensors} tensors and {n_keys} keys, more than its {size} bytes can hold")
    if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
        raise GGUFError(
            f"has {n_tensors} tensors and {n_keys} keys; expected at most {_MAX_TENSORS} and {_MAX_KEYS} of a Mamba-2 model"
        )
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string("a key", _MAX_NAME)
        if key in metadata:
            raise GGUFError(f"has the key {key!r} twice")
        metadata[key] = read_value(cursor, f"the value of {key!r}")
    for sentence in wrong_kinds(metadata):
        raise GGUFError(sentence)
    if is_part(metadata):
        which = f"part {metadata['split.no'] + 1}" if "split.no" in metadata else "a part"
        raise GGUFError(f"is {which} of {metadata['split.count']} of a split model; join them (llama-gguf-split --merge FIRST OUT)")  # fmt: skip
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment > 2**20 or alignment & (alignment - 1):
        raise GGUFError(f"general.alignment is {alignment!r}; expected a power of two from 8 to {2**20}")
    declared: dict[str, tuple[tuple[int, ...], GGMLType, int]] = {}
    for _ in range(n_tensors):
        name = cursor.string("a tensor's name", _MAX_NAME)
        if name in declared:
            raise GGUFError(f"has the tensor {name!r} twice")
        declared[name] = _declaration(cursor, name)
    return metadata, _place(declared, -(-cursor.at // alignment) * alignment, alignment, size)


def read_value(cursor: Cursor, what: str) -> Any:
    kind = cursor.number("I", what)
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        raise GGUFError(f"{what} has the unknown type {kind} at byte {cursor.at - 4}")
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind == _STRING:
        if count * 8 > cursor.left:
            raise GGUFError(f"{what} promises {count} strings at byte {cursor.at}, more than the file can hold")
        return _strings(cursor, count, what)
    if kind not in _SCALARS:
        raise GGUFError(f"{what} is an array of the type {kind} at byte {cursor.at - 12}; expected numbers or strings")
    item = struct.calcsize("<" + _SCALARS[kind])
    numbers = np.frombuffer(cursor.take(count * item, what), np.dtype("<" + _SCALARS[kind]))
    if kind == _BOOL and count and numbers.view(np.uint8).max() > 1:
        raise GGUFError(f"{what} before byte {cursor.at} is an array of booleans that holds other bytes than 0 and 1")
    return StoredArray(count, lambda i: numbers[i].item())


def _strings(cursor: Cursor, count: int, what: str) -> StoredArray:
    starts = np.empty(count, np.int64)
    for i in range(count):
        starts[i] = cursor.at
        cursor.string(what)
    view = cursor.view

    def item(i: int) -> str:
        start = int(starts[i])
        return str(view[start + 8 : start + 8 + int.from_bytes(view[start : start + 8], "little")], "utf-8")

    return StoredArray(count, item)


def _declaration(cursor: Cursor, name: str) -> tuple[tuple[int, ...], GGMLType, int]:
    """One tensor as the header declares it: numpy-order shape, type, offset into the data section."""
    n_dimensions = cursor.number("I", f"the dimensions of {name!r}")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise GGUFError(f"{name!r} has {n_dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q", f"the dimensions of {name!r}") for _ in range(n_dimensions))[::-1]
    if 0 in shape or math.prod(shape) >= 2**62:
        raise GGUFError(f"{name!r} has the shape {list(shape)}; expected positive dimensions that do not overflow")
    type_id = cursor.number("I", f"the type of {name!r}")
    try:
        kind = GGMLType(type_id)
    except ValueError:
        known = ", ".join(f"{t.name} ({t})" for t in GGMLType)
        raise GGUFError(f"{name!r} has the type {type_id}; this release reads {known}") from None
    if shape[-1] % kind.block_size:
        raise GGUFError(
            f"{name!r} has rows of {shape[-1]}, not a multiple of the {kind.name} block of {kind.block_size}"
        )
    return shape, kind, cursor.number("Q", f"the offset of {name!r}")


def _place(
    declared: dict[str, tuple[tuple[int, ...], GGMLType, int]], start: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """Absolute places; tensors must follow one another without gap or overlap, as llama.cpp requires."""
    placed = {}
    names = list(declared)
    expected = 0
    for position, name in enumerate(names):
        shape, kind, offset = declared[name]
        if offset != expected:
            raise GGUFError(
                f"{name!r} starts at offset {offset} of the data; expected {expected} (aligned, no gap or overlap)"
            )
        nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        following = declared[names[position + 1]][2] if position + 1 < len(names) else size - start
        if kind is GGMLType.Q2_0 and following - offset < nbytes and shape[-1] % 128 == 0:
            other = math.prod(shape) // 128 * 34
            if 0 <= following - offset - other < alignment:
                raise GGUFError(f"{name!r} is a Q2_0 with blocks of 128 (another project's); expected blocks of 64")
        if start + offset + nbytes > size:
            raise GGUFError(
                f"{name!r} reaches to byte {start + offset + nbytes}, but the file has {size}; it is truncated"
            )
        placed[name] = TensorInfo(name, shape, kind, start + offset, nbytes)
        expected = -(-(offset + nbytes) // alignment) * alignment
    return placed
