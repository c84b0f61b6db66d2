"""The header of a GGUF, whatever its types are, and what is wrong with where the tensors lie."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.doctor.types import Q2_0, Q2_0_G128, TYPES, TypeFact
from tmexport.errors import GGUFError, UsageError
from tmexport.gguf.reader import Cursor, read_value, read_version

_MOST = 2**20  # keys and tensors


@dataclass(frozen=True)
class Tensor:
    """As the header declares it: ggml's order of dimensions (the contiguous one first), offset in the data section."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    fact: TypeFact

    @property
    def n_bytes(self) -> int | None:
        """None: the type's size is not known."""
        if not self.fact.block:
            return None
        return math.prod(self.shape) // self.fact.block * self.fact.bytes


@dataclass(frozen=True)
class Header:
    """Keys, tensors, where the keys begin and end in the file, where the data begins, and the alignment."""

    version: int
    metadata: dict[str, Any]
    tensors: list[Tensor]
    keys: tuple[int, int]
    start: int
    alignment: int


def open_bytes(path: Path) -> np.ndarray:
    try:
        if not path.is_file():
            raise UsageError(f"{path}: no such file; expected a GGUF")
        return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_header(data: np.ndarray) -> Header:
    """The header of a GGUF, whatever its types are.

    Raises:
        GGUFError: it is no GGUF, or the header is damaged or cut off.
    """
    cursor = Cursor(data)
    version = read_version(cursor)
    n_tensors, n_keys = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
    if max(n_tensors, n_keys) > _MOST or 13 * n_keys + 32 * n_tensors > cursor.left:
        raise GGUFError(f"promises {n_tensors} tensors and {n_keys} keys, more than its bytes can hold")
    begin, metadata = cursor.at, {}
    for _ in range(n_keys):
        key = cursor.string("a key", 2**16)
        if key in metadata:
            raise GGUFError(f"has the key {key!r} twice")
        metadata[key] = read_value(cursor, f"the value of {key!r}")
    end, declared = cursor.at, []
    for _ in range(n_tensors):
        name = cursor.string("a tensor's name", 2**16)
        n_dimensions = cursor.number("I", f"the dimensions of {name!r}")
        if not 1 <= n_dimensions <= 4:
            raise GGUFError(f"{name!r} has {n_dimensions} dimensions; expected 1 to 4")
        shape = tuple(cursor.number("Q", f"the dimensions of {name!r}") for _ in range(n_dimensions))
        declared.append((name, shape, cursor.number("I", f"the type of {name!r}"), cursor.number("Q", f"the offset of {name!r}")))  # fmt: skip
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        raise GGUFError(f"general.alignment is {alignment!r}; expected a power of two from 8")
    start = -(-cursor.at // alignment) * alignment
    return Header(version, metadata, _named(declared, start, alignment, data.size), (begin, end), start, alignment)


def _named(
    declared: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> list[Tensor]:
    """Tensors with the facts of their type; Q2_0 by the space that it takes."""
    ends = sorted({offset for *_, offset in declared} | {max(0, size - start)})
    tensors = []
    for name, shape, type_id, offset in declared:
        fact = TYPES.get(type_id, TypeFact(f"id {type_id}", 0, 0, "an unknown program"))
        room = next((end for end in ends if end > offset), offset) - offset
        if type_id == Q2_0 and shape[0] % 128 == 0 and 0 <= room - math.prod(shape) // 128 * 34 < alignment:
            fact = Q2_0_G128
        tensors.append(Tensor(name, shape, type_id, offset, fact))
    return tensors


def layout_problems(header: Header, size: int) -> list[str]:
    """Truncation, alignment, rows that are no whole blocks, gaps and overlaps."""
    found, expected, whole = [], 0, True
    for tensor in header.tensors:
        n_bytes = tensor.n_bytes
        if 0 in tensor.shape or math.prod(tensor.shape) >= 2**62:
            found.append(f"{tensor.name!r} has the shape {list(tensor.shape)}")
            break
        if tensor.fact.block and tensor.shape[0] % tensor.fact.block:
            found.append(f"{tensor.name!r} has rows of {tensor.shape[0]}, no multiple of the {tensor.fact.name} block of {tensor.fact.block}")  # fmt: skip
        if tensor.offset % header.alignment:
            found.append(f"{tensor.name!r} starts at offset {tensor.offset}, which is not aligned to {header.alignment}")  # fmt: skip
        elif whole and tensor.offset != expected:
            found.append(f"{tensor.name!r} starts at offset {tensor.offset} of the data; expected {expected}: a gap or an overlap, which llama.cpp refuses")  # fmt: skip
        if header.start + tensor.offset + (n_bytes or 1) > size:
            found.append(f"is truncated: {tensor.name!r} reaches to byte {header.start + tensor.offset + (n_bytes or 1)}, the file has {size}")  # fmt: skip
        whole = n_bytes is not None
        expected = -(-(tensor.offset + (n_bytes or 0)) // header.alignment) * header.alignment
        if len(found) >= 5:
            break
    names = [tensor.name for tensor in header.tensors]
    if len(set(names)) != len(names):
        found.append(f"has the tensor {Counter(names).most_common(1)[0][0]!r} twice")
    return found
