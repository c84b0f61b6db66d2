"""Reading `pytorch_model.bin` one tensor at a time: the pickle names the tensors, the data is read at its offset.

torch unpickles with `weights_only`, so a payload never executes, and under FakeTensorMode, so no storage is loaded: the
archive keeps every storage uncompressed at a known offset.
"""

from __future__ import annotations

import pickle
from pathlib import Path

from tmexport.errors import CheckpointError
from tmexport.safetensors_io import StoredTensor


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
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: is not a torch archive of tensors alone: {first}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected a state dict of tensors")
    index, size = {}, path.stat().st_size
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in names:
            raise CheckpointError(
                f"{path}: {name} is a {getattr(tensor, 'dtype', type(tensor).__name__)}; expected floats"
            )
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if start is None or not tensor.is_contiguous():
            raise CheckpointError(f"{path}: {name} is not stored contiguously; save it again with torch.save")
        offset = start + tensor.storage_offset() * tensor.element_size()
        if offset + tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(f"{path}: {name} reaches past the end of the file; it is truncated")
        index[name] = StoredTensor(path, offset, names[tensor.dtype], tuple(tensor.shape))
    return index
