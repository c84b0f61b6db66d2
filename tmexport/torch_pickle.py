"""What a pickle that torch.save wrote says about its tensors, without torch and without running anything it names.

`data.pkl` in the archive holds no numbers: a tensor is a call of one of torch's rebuilding functions with a storage's name,
an offset, a shape and strides. Each such name stands here for a description; every other one is refused, and nothing is
ever imported. Format: torch/serialization.py (`persistent_id`) and torch/_utils.py (`_rebuild_*`).
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from tmexport.errors import CheckpointError

_STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "UntypedStorage": ("uint8", 1),
}
# Opcodes that torch.save never writes and that allocate what they claim, or look a name up elsewhere than in find_class.
_NEVER_WRITTEN = (
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.INST,
    pickle.OBJ,
)


@dataclass(frozen=True)
class PickledStorage:
    """A storage as the pickle claims it: the name of its record under `data/`, torch's dtype, bytes."""

    key: str
    dtype: str
    itemsize: int
    n_bytes: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as the pickle claims it; offset and strides in values."""

    storage: PickledStorage
    dtype: str
    itemsize: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        expected = 1
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if length != 1 and stride != expected:
                return 0 in self.shape
            expected *= length
        return True

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


class Other:
    """Stands for a value that is no dense tensor: a dtype, a size, a device, a sparse tensor; `name` is torch's."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: object) -> Other:
        return self


def read_pickle(data: bytes) -> object:
    """The object that the pickle describes, with a PickledTensor in each tensor's place.

    Raises:
        CheckpointError: it names something other than torch's tensors and plain containers.
        Exception: almost any other, where the pickle is damaged.
    """
    return _Unpickler(io.BytesIO(data)).load()


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python: the one in C allocates a table of whatever size a memo's index claims."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _NEVER_WRITTEN}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name.endswith("Storage"):  # of quantised values: no weights of ours
            return name, 1
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module in ("torch", "torch._utils") or (module, name) in _OTHERS:
            return Other(f"{module}.{name}")
        raise CheckpointError(f"is not a torch archive of tensors alone: it names {module}.{name}")

    def load_build(self) -> None:
        """Attributes of an object are dropped: they would be set on what stands here for torch's functions."""
        self.stack.pop()  # type: ignore[attr-defined] # made by load()

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment] # of this class, where its parent says: of the parent

    def persistent_load(self, pid: Any) -> PickledStorage:
        kind, (dtype, itemsize), key, _, count = pid
        if kind != "storage" or type(count) is not int or not isinstance(key, str | int):
            raise CheckpointError("names a storage in a way that torch.save does not; the archive is damaged")
        return PickledStorage(str(key), dtype, itemsize, count * itemsize)


def _tensor(storage: PickledStorage, offset: int, shape: Any, strides: Any, *others: Any) -> PickledTensor:
    """`others`: requires_grad, hooks, and what changes the values that are stored."""
    _refuse_changed(others[2:])
    return _checked(storage, storage.dtype, storage.itemsize, offset, shape, strides)


def _tensor_of_dtype(storage: PickledStorage, offset: int, shape: Any, strides: Any, *others: Any) -> PickledTensor:
    """`others`: requires_grad, hooks, a dtype that has no storage of its own, which no checkpoint holds; so its size is not needed."""
    _refuse_changed(others[3:])
    return _checked(storage, others[2].name.removeprefix("torch."), 1, offset, shape, strides)


def _refuse_changed(metadata: tuple[Any, ...]) -> None:
    """torch keeps a negated or conjugated view as the values before it, and a flag."""
    if metadata and metadata[0]:
        raise CheckpointError(
            f"holds a view with the flag {next(iter(metadata[0]))}; save it again with .resolve_neg() or .resolve_conj()"
        )


def _checked(
    storage: PickledStorage, dtype: str, itemsize: int, offset: int, shape: Any, strides: Any
) -> PickledTensor:
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError("describes a tensor in a way that torch.save does not; the archive is damaged")
    return PickledTensor(storage, dtype, itemsize, offset, tuple(shape), tuple(strides))


def _parameter(tensor: object, *_: object) -> object:
    return tensor


def _with_attributes(function: Any, _kind: object, arguments: Any, _state: object) -> object:
    """A tensor on which Python attributes were set: only one of the functions above can make it."""
    if function not in _REBUILD:
        raise CheckpointError("is not a torch archive of tensors alone: it rebuilds a tensor by another class")
    return function(*arguments)


_REBUILD = (_tensor, _tensor_of_dtype, _parameter)
_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _with_attributes,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
}
_OTHERS = {
    ("torch.serialization", "_get_layout"),
    ("collections", "Counter"),
    ("_codecs", "encode"),
    *((module, name) for module in ("builtins", "__builtin__") for name in ("bytearray", "complex")),
}
