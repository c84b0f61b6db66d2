"""Reading `pytorch_model.bin` one tensor at a time: the pickle names the tensors, the data is read at its offset.

torch unpickles with `weights_only`, so a payload never executes, and under FakeTensorMode, so no storage is loaded: the
archive keeps every storage uncompressed at a known offset. What the pickle claims is checked against the archive's own
table: each tensor must lie inside one of its records.
"""

from __future__ import annotations

import struct
import warnings
import zipfile
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

from tmexport.errors import CheckpointError
from tmexport.safetensors_io import StoredTensor

_LARGEST_PICKLE = 2**22  # some 100 bytes a tensor


def index_torch_bin(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a torch archive (a flat state dict, torch >= 1.6's zip form), by name, without reading the data.

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
        records = _records(path)
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an odd pickle; the error says what matters
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"holds a {type(state).__name__}; expected a state dict of tensors")
        return {name: _place(path, name, tensor, records) for name, tensor in state.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged archive or pickle raises almost anything, in zipfile as in torch
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: is not a torch archive of tensors alone: {first}") from None


def _records(path: Path) -> list[tuple[int, int]]:
    """Where the records of the archive lie: (first byte, size), ascending. Nothing may be compressed or out of bounds."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise CheckpointError("is not a zip archive; if an old torch wrote it, load it there and save it again")
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


def _place(path: Path, name: object, tensor: Any, records: list[tuple[int, int]]) -> StoredTensor:
    import torch

    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    if not isinstance(name, str):
        raise CheckpointError(f"holds a tensor named {name!r}; expected text")
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in names:
        raise CheckpointError(f"{name} is a {getattr(tensor, 'dtype', type(tensor).__name__)}; expected floats")
    start = None if tensor.is_sparse else getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if start is None or not tensor.is_contiguous():
        raise CheckpointError(f"{name} is not stored contiguously; save it again with torch.save")
    # torch has checked that the tensor lies inside its storage; the storage's size is only what the pickle says.
    offset = start + tensor.storage_offset() * tensor.element_size()
    end = offset + tensor.numel() * tensor.element_size()
    position = bisect_right(records, (start, 2**63)) - 1
    if position < 0 or records[position][0] != start or not start <= offset <= end <= sum(records[position]):
        raise CheckpointError(f"{name} does not lie in one record, from byte {offset} to {end}; the archive is damaged")
    return StoredTensor(path, offset, names[tensor.dtype], tuple(tensor.shape))
