"""Reading `pytorch_model.bin` one tensor at a time: the pickle names the tensors, the data is read at its offset.

torch unpickles with `weights_only`, so a payload never executes, and under FakeTensorMode, so no storage is loaded: the
archive keeps every storage uncompressed at a known offset. What the pickle claims is checked against the archive's own
table: each tensor must lie inside one of its records. torch's form before 1.6 has no such table and is read whole.
"""

from __future__ import annotations

import struct
import tarfile
import warnings
import zipfile
from bisect import bisect_right
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.errors import CheckpointError
from tmexport.safetensors_io import StoredTensor

_LARGEST_PICKLE = 2**22  # some 100 bytes a tensor
_LARGEST_EXPANDED = 2**20  # bytes of a view that shows some of them more than once
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
)  # where trainers put it: Lightning, torch's tutorial, ours, DeepSpeed
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}


@dataclass(frozen=True)
class HeldTensor(StoredTensor):
    """A tensor that had to be read with its whole file; `tensor` is torch's."""

    tensor: Any = None

    def read(self) -> np.ndarray:
        """The tensor; bfloat16 arrives as fp32 (exact)."""
        tensor = self.tensor.detach()
        return (tensor.float() if self.dtype == "BF16" else tensor).contiguous().numpy()

    def is_at(self, other: StoredTensor) -> bool:
        """No two are known to be one."""
        return False


def index_torch_bin(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a state dict that torch.save wrote, by name; without reading the data, except for the form before 1.6.

    Raises:
        CheckpointError: torch is not installed, the file is not such an archive, or it holds anything but tensors.
    """
    try:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError:
        raise CheckpointError(
            f"{path}: reading it needs torch; run `pip install 'tmexport[qat]'`, or convert it to safetensors"
        ) from None
    try:
        is_zip = _is_zip(path)
        if not is_zip and not _is_old_form(path):
            raise CheckpointError("is not a zip archive, nor torch's form before 1.6; the file is damaged or truncated")
        records = _records(path) if is_zip else []
        with FakeTensorMode() if is_zip else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle; the error says what matters
            state = torch.load(path, map_location="cpu", weights_only=True)
        place = partial(_place, records=records) if is_zip else _held
        return {name: place(path, name, tensor) for name, tensor in _state_dict(state).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged archive or pickle raises almost anything, in zipfile as in torch
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: is not a torch archive of tensors alone: {first}") from None


def _records(path: Path) -> list[tuple[int, int]]:
    """Where the records of the archive lie: (first byte, size), ascending. Nothing may be compressed or out of bounds."""
    size = path.stat().st_size
    records = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise CheckpointError(f"{entry.filename} is compressed; expected an archive as torch.save writes it")
            if entry.filename.endswith(".pkl") and entry.file_size > _LARGEST_PICKLE:
                raise CheckpointError(
                    f"{entry.filename} has {entry.file_size} bytes; expected at most {_LARGEST_PICKLE}"
                )
            file.seek(entry.header_offset)
            magic, name_length, extra_length = struct.unpack("<4s22xHH", file.read(30))
            start = entry.header_offset + 30 + name_length + extra_length
            if magic != b"PK\3\4" or start + entry.file_size > size:
                raise CheckpointError(f"{entry.filename} at byte {entry.header_offset} is damaged or truncated")
            records.append((start, entry.file_size))
    records.sort()
    for (start, length), (following, _) in pairwise(records):
        if start + length > following:
            raise CheckpointError(f"records overlap at byte {following}; the archive is damaged")
    return records


def _is_zip(path: Path) -> bool:
    """Whether the file is a zip archive from its first byte, as torch wants it, to the table at its end."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4" and zipfile.is_zipfile(path)


def _is_old_form(path: Path) -> bool:
    """Whether the file starts as torch.save's did before 1.6: with the pickle of a magic number.

    Nor may it be a tar archive, whose first member's name can start so: unpickling those was not safe in torch 2.5.
    """
    magic = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic and not tarfile.is_tarfile(path)


def _state_dict(state: object) -> dict[Any, Any]:
    """The tensors by name: the object itself, or the one place inside it where a trainer keeps them."""
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__}; expected a state dict of tensors")
    nested = [key for key in _NESTED if isinstance(state.get(key), dict)]
    if len(nested) > 1:
        raise CheckpointError(f"holds the dicts {' and '.join(nested)}; expected one, or the tensors themselves")
    return state[nested[0]] if nested else state


def _dtype(name: object, tensor: object) -> str:
    """The tensor's dtype as safetensors calls it, after checking that it has a name and holds floats."""
    import torch

    if not isinstance(name, str):
        raise CheckpointError(f"holds a tensor named {name!r}; expected text")
    found = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
    if found not in _DTYPES:
        raise CheckpointError(f"{name} is a {found}; expected floats")
    if tensor.layout is not torch.strided:  # type: ignore[attr-defined]
        raise CheckpointError(f"{name} is sparse; save it again with .to_dense()")
    return _DTYPES[found]


def _held(path: Path, name: object, tensor: Any) -> HeldTensor:
    """A tensor that torch has read."""
    dtype = _dtype(name, tensor)
    _refuse_expanded(name, tensor, tensor.untyped_storage().nbytes())
    return HeldTensor(path, 0, dtype, tuple(tensor.shape), tensor=tensor)


def _refuse_expanded(name: object, tensor: Any, n_bytes: int) -> None:
    """A view may show a value any number of times: a file of a few bytes would fill the memory."""
    if tensor.numel() * tensor.element_size() > max(_LARGEST_EXPANDED, n_bytes):
        raise CheckpointError(f"{name} has more values than are stored; save it again with .contiguous()")


def _place(path: Path, name: object, tensor: Any, records: list[tuple[int, int]]) -> StoredTensor:
    """Where a tensor's data lies in the archive."""
    dtype = _dtype(name, tensor)
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None:
        raise CheckpointError(f"{name} has no data in the archive; save it again with torch.save")
    # torch has checked that the tensor lies inside its storage; the storage's size is only what the pickle says.
    offset = start + tensor.storage_offset() * tensor.element_size()
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    place = StoredTensor(path, offset, dtype, tuple(tensor.shape), strides)
    end = offset + place.span * tensor.element_size()
    position = bisect_right(records, (start, 2**63)) - 1
    if position < 0 or records[position][0] != start or not start <= offset <= end <= sum(records[position]):
        raise CheckpointError(f"{name} does not lie in one record, from byte {offset} to {end}; the archive is damaged")
    _refuse_expanded(name, tensor, records[position][1])
    return place
