"""Reading `pytorch_model.bin` one tensor at a time: the pickle names the tensors, the data is read at its offset.

The archive keeps every storage uncompressed in a record of its own. What the pickle claims (torch_pickle.py reads it, without
torch) is checked against the archive's own table: a storage must be its record, a tensor must lie inside it. torch's form
before 1.6 has no such table and is read whole, by torch, with `weights_only`: a payload never executes.
"""

from __future__ import annotations

import struct
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.errors import CheckpointError
from tmexport.safetensors_io import StoredTensor
from tmexport.torch_pickle import Other, PickledTensor, read_pickle

_LARGEST_PICKLE = 2**22  # some 100 bytes a tensor
_LARGEST_EXPANDED = 2**20  # bytes of a view that shows some of them more than once
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
)  # where trainers put it: Lightning, torch's tutorial, ours, DeepSpeed
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}

Records = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class HeldTensor(StoredTensor):
    """A tensor that had to be read with its whole file; `tensor` is torch's."""

    tensor: Any = None

    def read(self) -> np.ndarray:
        """The tensor; bfloat16 arrives as fp32 (exact)."""
        tensor = self.tensor.detach().resolve_neg()
        return (tensor.float() if self.dtype == "BF16" else tensor).contiguous().numpy()

    def is_at(self, other: StoredTensor) -> bool:
        """No two are known to be one."""
        return False


def index_torch_bin(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a state dict that torch.save wrote, by name; without reading the data, except for the form before 1.6.

    Raises:
        CheckpointError: the file is not such an archive, it holds anything but tensors, or it has the form before 1.6 and
            torch is not installed.
    """
    try:
        if _is_zip(path):
            records = _records(path)
            return {n: _place(path, n, t, records) for n, t in _state_dict(_read_pickle(path, records)).items()}
        if _is_old_form(path):
            return {name: _held(path, name, tensor) for name, tensor in _state_dict(_read_old_form(path)).items()}
        raise CheckpointError("is not a zip archive, nor torch's form before 1.6; the file is damaged or truncated")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged archive or pickle raises almost anything, in zipfile as in torch
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: is not a torch archive of tensors alone: {first}") from None


def _records(path: Path) -> Records:
    """Where the records of the archive lie: (first byte, size), by their names inside it.

    Nothing may be compressed, twice there, overlapping or out of bounds.
    """
    size = path.stat().st_size
    records: Records = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        if any(entry.filename.endswith("/constants.pkl") for entry in archive.infolist()):
            raise CheckpointError("is a TorchScript archive; expected one that torch.save wrote of a state dict")
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
            name = entry.filename.partition("/")[2]  # the first part is the file's name when it was saved
            if name in records:
                raise CheckpointError(f"holds two records named {name}; the archive is damaged")
            records[name] = (start, entry.file_size)
    for (start, length), (following, _) in pairwise(sorted(records.values())):
        if start + length > following:
            raise CheckpointError(f"records overlap at byte {following}; the archive is damaged")
    return records


def _read_pickle(path: Path, records: Records) -> object:
    """What data.pkl describes, after checking that the archive is of torch.save's kind."""
    if "data.pkl" not in records:
        raise CheckpointError("is not a torch archive of tensors alone: it has no data.pkl")
    if "byteorder" in records and _read_record(path, records["byteorder"]) != b"little":
        raise CheckpointError("holds numbers in big-endian order; save it again on a little-endian machine")
    return read_pickle(_read_record(path, records["data.pkl"]))


def _read_record(path: Path, record: tuple[int, int]) -> bytes:
    with open(path, "rb") as file:
        file.seek(record[0])
        return file.read(record[1])


def _read_old_form(path: Path) -> object:
    """The whole file, by torch."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            "has torch's form before 1.6, which needs torch; run `pip install 'tmexport[qat]'`, or convert it to safetensors"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an odd pickle; the error says what matters
        return torch.load(path, map_location="cpu", weights_only=True)


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
    found = state[nested[0]] if nested else state
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _known(name: object, found: str, is_sparse: bool) -> str:
    """The dtype as safetensors calls it, after checking that the tensor has a name and holds floats."""
    if not isinstance(name, str):
        raise CheckpointError(f"holds a tensor named {name!r}; expected text")
    if is_sparse:
        raise CheckpointError(f"{name} is sparse; save it again with .to_dense()")
    if found not in _DTYPES:
        raise CheckpointError(f"{name} is a {found}; expected floats")
    return _DTYPES[found]


def _refuse_expanded(name: object, n_bytes: int, stored: int) -> None:
    """A view may show a value any number of times: a file of a few bytes would fill the memory."""
    if n_bytes > max(_LARGEST_EXPANDED, stored):
        raise CheckpointError(f"{name} has more values than are stored; save it again with .contiguous()")


def _held(path: Path, name: object, tensor: Any) -> HeldTensor:
    """A tensor that torch has read."""
    import torch

    is_tensor = isinstance(tensor, torch.Tensor)
    found = str(tensor.dtype) if is_tensor else type(tensor).__name__
    dtype = _known(name, found, is_tensor and tensor.layout is not torch.strided)
    _refuse_expanded(name, tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
    return HeldTensor(path, 0, dtype, tuple(tensor.shape), tensor=tensor)


def _place(path: Path, name: object, tensor: Any, records: Records) -> StoredTensor:
    """Where a tensor's data lies in the archive."""
    if isinstance(tensor, PickledTensor):
        found = f"torch.{tensor.dtype}"
    else:
        found = tensor.name if isinstance(tensor, Other) else type(tensor).__name__
    dtype = _known(name, found, found == "torch._utils._rebuild_sparse_tensor")
    storage = tensor.storage
    if f"data/{storage.key}" not in records:
        raise CheckpointError(f"{name} has no data in the archive; save it again with torch.save")
    start, size = records[f"data/{storage.key}"]
    offset = start + tensor.offset * tensor.itemsize
    place = StoredTensor(path, offset, dtype, tensor.shape, None if tensor.is_contiguous else tensor.strides)
    end = offset + place.span * tensor.itemsize
    if end > start + size:
        raise CheckpointError(f"{name} does not lie in one record, from byte {offset} to {end}; the archive is damaged")
    if not 0 <= size - storage.n_bytes < storage.itemsize:  # a view by a wider type has no last, partial value
        raise CheckpointError(
            f"{name} lies in a storage of {storage.n_bytes} bytes whose record has {size}; the archive is damaged"
        )
    _refuse_expanded(name, tensor.n_bytes, size)
    return place
