"""Reading safetensors one tensor at a time, without mapping the file: peak memory is one tensor, not the model.

The safetensors library validates the header (offsets, overlaps, dtypes, sizes); we only seek and read, and widen
bfloat16, which numpy does not have.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from tmexport.errors import CheckpointError

_LARGEST_HEADER = 2**22  # some 100 bytes a tensor; as Python objects a header takes 10 times its size
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, absolute byte offset, safetensors dtype name, shape.

    strides: in values, of a tensor that is not contiguous (a torch archive keeps views as they are); else None.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def span(self) -> int:
        """The values from the tensor's first to its last in the file."""
        if self.strides is None or 0 in self.shape:
            return math.prod(self.shape)
        return 1 + sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize if self.dtype in _DTYPES else 0

    def is_at(self, other: StoredTensor) -> bool:
        """Whether both are the same bytes."""
        return self == other

    def read(self) -> np.ndarray:
        """The tensor in its stored dtype; bfloat16 arrives as fp32 (exact).

        Raises:
            CheckpointError: the file shrank, or the dtype is not one a checkpoint holds.
        """
        if self.dtype not in _DTYPES:
            raise CheckpointError(f"{self.path}: dtype {self.dtype} is not supported; expected F32, F16 or BF16")
        count = self.span
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = np.fromfile(file, _DTYPES[self.dtype], count)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from None
        if data.size != count:
            raise CheckpointError(f"{self.path}: ends inside a tensor; expected {count} values, found {data.size}")
        if self.dtype == "BF16":
            data = (data.astype(np.uint32) << 16).view(np.float32)
        if self.strides is None or 0 in self.shape:
            return data.reshape(self.shape)
        steps = tuple(stride * data.itemsize for stride in self.strides)
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(data, self.shape, steps))


def index_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name, without reading the data.

    Raises:
        CheckpointError: the file is missing or is not a valid safetensors file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                raise CheckpointError(f"{path}: claims a header of {length} bytes; expected at most {_LARGEST_HEADER}")
            with safetensors.safe_open(path, framework="np"):
                pass  # the library's own validation of the whole header against the file's size
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: is not a valid safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }
