"""Writing GGUF version 3, one tensor at a time (specification: ggml/docs/gguf.md).

The bytes depend on the arguments alone: the same checkpoint gives the same file on every run.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmexport.files import atomic_write
from tmexport.types import GGMLType

ALIGNMENT = 32
Value = bool | int | float | str | Sequence[str] | Sequence[int]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: numpy-order shape, type, and a function that makes its bytes, uint8 [n, row_bytes]."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLType
    make: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        rows = int(np.prod(self.shape[:-1], dtype=np.int64))
        return rows * self.kind.row_bytes(self.shape[-1])


def header_bytes(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> bytes:
    """Everything before the tensor data, padded to the alignment."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _typed(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]  # ggml counts the contiguous dimension first
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", tensor.kind, offset))
        offset += _padded(tensor.n_bytes)
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def file_bytes(metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> int:
    """The size of the file that `write_gguf` makes of these."""
    return len(header_bytes(metadata, tensors)) + sum(_padded(tensor.n_bytes) for tensor in tensors)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[PlannedTensor],
    on_tensor: Callable[[PlannedTensor], None] = lambda tensor: None,
) -> int:
    """Write the file atomically and return its size in bytes; `on_tensor` is called after each tensor.

    Raises:
        TmexportError: the file cannot be written; nothing is left behind.
    """
    with atomic_write(path) as file:
        file.write(header_bytes(metadata, tensors))
        for tensor in tensors:
            data = tensor.make()
            assert data.nbytes == tensor.n_bytes, tensor.name
            file.write(np.ascontiguousarray(data).data.cast("B"))
            file.write(b"\0" * (_padded(data.nbytes) - data.nbytes))
            on_tensor(tensor)
        return file.tell()


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _typed(value: Value) -> bytes:
    """A value with its type id: bool, uint32, float32, string, or an array of strings or int32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(_string(item) for item in value)  # type: ignore[arg-type]
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
