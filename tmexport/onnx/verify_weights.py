"""The weights of an ONNX file against those of its checkpoint, read by code that shares nothing with the writer's packing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tmexport.checkpoint import Checkpoint
from tmexport.errors import CheckpointError
from tmexport.files import file_in
from tmexport.model import ModelTensor
from tmexport.model.spec import NEG_EXP
from tmexport.onnx.names import ModelInfo, OnnxError
from tmexport.onnx.weights import initializer_name
from tmexport.types import first_true
from tmexport.verify import Difference

_RUN = 32  # weights: every group and every block is some of these runs


def stored_array(tensor: onnx.TensorProto, path: Path) -> np.ndarray:
    """A weight of the file `path`, from the file itself or from the data file beside it; only this one is read.

    Raises:
        OnnxError: it is damaged, or in a file that is not there or not beside the model.
    """
    try:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return _external(tensor, path)
        return numpy_helper.to_array(tensor)
    except (OnnxError, CheckpointError):
        raise
    except Exception as error:  # numpy_helper raises what numpy does when the bytes do not fit the shape
        raise OnnxError(f"{path}: {tensor.name} is damaged: {' '.join(str(error).split())}") from None


def data_file(tensor: onnx.TensorProto, path: Path) -> Path:
    """The second file that holds a weight; it must be in the model's folder, for the model may be a stranger's.

    Raises:
        OnnxError, CheckpointError: it is elsewhere, or not there.
    """
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if location in ("", ".", "..") or "/" in location or "\\" in location:
        raise OnnxError(f"{path}: {tensor.name} lies in {location!r}; expected a file beside the model")
    return file_in(path.parent, location)


def _external(tensor: onnx.TensorProto, path: Path) -> np.ndarray:
    place = {entry.key: entry.value for entry in tensor.external_data}
    file = data_file(tensor, path)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
    offset, length = int(place.get("offset", 0)), int(place.get("length", -1))
    size, needed = file.stat().st_size, math.prod(tensor.dims) * dtype.itemsize
    if min(tensor.dims, default=0) < 0 or length != needed or not 0 <= offset <= size - needed:
        raise OnnxError(
            f"{path}: {tensor.name} is {length} bytes at {offset} of {file.name}; expected {needed} within its {size}"
        )
    return np.fromfile(file, dtype, math.prod(tensor.dims), offset=offset).reshape(tuple(tensor.dims))


def _get(path: Path, stored: dict[str, onnx.TensorProto], name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """A stored weight; `shape` may be any with the same number of values in the same order."""
    array = stored_array(stored[name], path)
    if array.dtype != np.dtype(dtype) or array.size != int(np.prod(shape, dtype=np.int64)):
        raise OnnxError(f"{path}: {name} is {array.dtype} {list(array.shape)}; expected {dtype} {list(shape)}")
    return array.reshape(shape)


def _two_bits(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed >> 2 * i & 3 for i in range(4)], axis=2).view(np.int8) - 1


def _four_bits(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=2).view(np.int8) - 8


def _eight_bits(packed: np.ndarray) -> np.ndarray:
    return (packed.astype(np.int16) - 128).astype(np.int8) if packed.dtype == np.uint8 else packed


# codes a byte, and how bytes [n, k / that] are taken apart
_READERS = {"ternary": (4, _two_bits), "binary": (4, _two_bits), "int4": (2, _four_bits), "int8": (1, _eight_bits)}


def compare_codes(
    checkpoint: Checkpoint, path: Path, stored: dict[str, onnx.TensorProto], info: ModelInfo, name: str
) -> tuple[Difference | None, int, int]:
    """The first code or scale of a weight that differs, and how many of each were compared.

    Raises:
        OnnxError: it is not stored as a file of this form stores it.
    """
    expected = checkpoint.codes(name)
    n, k = expected.shape
    kind = info.weights[checkpoint.config.tensors[name].role].kind
    per_byte, read = _READERS[kind]
    signed = kind == "int8" and info.form != "ort"
    codes = read(_get(path, stored, f"{name}.codes", "i1" if signed else "u1", (n, k // per_byte))).reshape(n, k)
    differs = codes != expected.codes
    if differs.any():
        row, column = first_true(differs)
        want = f"code {expected.codes[row, column]} in column {column}"
        return Difference(name, row, column // expected.group_size, want, f"{codes[row, column]}"), 0, 0
    stored_scales = stored[f"{name}.scales"]
    count = int(np.prod(stored_scales.dims, dtype=np.int64))
    dtype = "<f4" if info.form == "ort" else "<f2"
    scales = _get(path, stored, f"{name}.scales", dtype, (n, max(1, count // n)))
    # Both sides at one value a run, in fp32 (fp16 to fp32 is exact), whichever group is the wider one.
    wanted = np.repeat(expected.scales.astype(np.float32), expected.group_size // _RUN, axis=1)
    found = np.repeat(scales.astype(np.float32), k // _RUN // scales.shape[1], axis=1)
    if wanted.shape != found.shape:
        return Difference(name, None, None, f"{wanted.size} scales", f"{found.size}"), 0, 0
    differs = wanted.view(np.uint32) != found.view(np.uint32)
    if differs.any():
        row, run = first_true(differs)
        place = (row, run * _RUN // expected.group_size)
        return Difference(name, *place, f"scale {wanted[row, run]!r}", f"{found[row, run]!r}"), 0, 0
    return None, codes.size, scales.size


def compare_small(
    checkpoint: Checkpoint, path: Path, stored: dict[str, onnx.TensorProto], tensor: ModelTensor
) -> Difference | None:
    """The first value of a vector or a convolution that differs in any bit."""
    expected, name = checkpoint.dense(tensor.hf).astype(np.float32, copy=False), initializer_name(tensor)
    if tensor.transform == NEG_EXP:
        expected = (-np.exp(expected.astype(np.float64))).astype(np.float32)
    found = _get(path, stored, name, "<f4", expected.shape)
    return _first_difference(name, expected, found, expected.view(np.uint32) == found.view(np.uint32))


def compare_values(
    checkpoint: Checkpoint, path: Path, stored: dict[str, onnx.TensorProto], info: ModelInfo, tensor: ModelTensor
) -> Difference | None:
    """The first value of a matrix that is no codes of the checkpoint's that is not its value, rounded as its type rounds."""
    name = tensor.hf
    kind = info.embedding_type if tensor.block is None else info.dense_type
    expected = checkpoint.dense(name).astype(np.float32, copy=False)
    if kind == "f32":
        found = _get(path, stored, name, "<f4", expected.shape)
        return _first_difference(name, expected, found, expected.view(np.uint32) == found.view(np.uint32))
    if kind == "f16":
        found = _get(path, stored, name, "<f2", expected.shape)
        return _first_difference(name, expected, found, expected.astype(np.float16) == found)
    n, k = expected.shape
    if info.form == "ort":
        codes = _get(path, stored, f"{name}.codes", "u1", (n, k // 64, 64)).astype(np.float32) - 128
        scales = _get(path, stored, f"{name}.scales", "<f4", (n, k // 64, 1))
    else:
        codes = _get(path, stored, f"{name}.codes", "i1", (n, k // 32, 32)).astype(np.float32)
        scales = _get(path, stored, f"{name}.scales", "<f2", (n, k // 32, 1)).astype(np.float32)
    found = (codes * scales).reshape(n, k)
    # Half a step of the block, and the roundings of the scale (fp16: 2**-11 of it, or half of the smallest subnormal).
    largest = np.abs(expected).reshape(codes.shape).max(axis=2)
    bound = largest / 127 / 2 * np.float32(1.0001) + (largest * 2.0**-11 + 2.0**-24 * 127 if info.form != "ort" else 0)
    ok = np.abs(expected - found) <= np.repeat(bound, codes.shape[2], axis=1)
    return _first_difference(name, expected, found, ok)


def _first_difference(name: str, expected: np.ndarray, found: np.ndarray, ok: np.ndarray) -> Difference | None:
    if ok.all():
        return None
    place = first_true(~ok)
    return Difference(name, place[0], None, f"{expected[place]!r} at {list(place)}", f"{found[place]!r}")
