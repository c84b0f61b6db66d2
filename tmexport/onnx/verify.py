"""Compare a checkpoint with the ONNX file that was exported from it.

The weights are read back by code that shares nothing with the writer's packing; the nodes must be, byte for byte, those
that this release writes for the model, so that a right weight in a wrong place cannot pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tmexport.checkpoint import Checkpoint
from tmexport.errors import CheckpointError, NotTernaryError
from tmexport.files import file_in
from tmexport.model import ModelTensor
from tmexport.model.spec import NEG_EXP
from tmexport.onnx.graph import build_graph
from tmexport.onnx.names import ModelInfo, OnnxError, config_path, info_from_metadata, tokenizer_path
from tmexport.onnx.weights import initializer_name
from tmexport.tokenizer.gguf import export_tokenizer
from tmexport.types import first_true
from tmexport.verify import Difference, Report

_NOT_COMPARED = {"chunk_size", "bos_token_id", "eos_token_id"}  # of training code, and of the tokenizer


def load_onnx(path: Path) -> tuple[onnx.ModelProto, ModelInfo]:
    """A file written by `tmexport onnx`, parsed whole.

    Raises:
        OnnxError: there is no such file, it is damaged, or another program wrote it.
    """
    if not path.is_file():  # a pipe would never end
        raise OnnxError(f"{path}: no such file; expected a file written by `tmexport onnx`")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public base; OSError
        raise OnnxError(f"{path}: is not a readable ONNX file: {' '.join(str(error).split())}") from None
    return model, info_from_metadata({p.key: p.value for p in model.metadata_props}, path)


def verify_onnx(
    checkpoint: Checkpoint,
    path: Path,
    on_tensor: Callable[[str], None] = lambda name: None,
    tokenizer: Path | None = None,
) -> Report:
    """Compare the dimensions, the nodes, every weight and the tokenizer beside the file; stops at the first difference.

    The arguments are those of `tmexport.verify.verify_gguf`.

    Raises:
        OnnxError: the file is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    model, info = load_onnx(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    difference = _compare_config(checkpoint, info) or _compare_graph(checkpoint, path, model, info, stored)
    n_ternary = n_codes = n_scales = n_other = 0
    for name, tensor in checkpoint.config.tensors.items() if difference is None else ():
        if name in checkpoint.config.projections:
            difference, codes, scales = _compare_ternary(checkpoint, path, stored, info, name)
            n_ternary, n_codes, n_scales = n_ternary + 1, n_codes + codes, n_scales + scales
        elif tensor.low_bit:
            difference = _compare_embedding(checkpoint, path, stored, info, name)
            n_other += 1
        else:
            difference = _compare_small(checkpoint, path, stored, tensor)
            n_other += 1
        if difference is not None:
            break
        on_tensor(name)
    return Report(n_ternary, n_codes, n_scales, n_other, difference or _compare_tokenizer(checkpoint, path, tokenizer))


def _compare_config(checkpoint: Checkpoint, info: ModelInfo) -> Difference | None:
    expected, found = checkpoint.config.dimensions(), info.config.dimensions()
    for field in (name for name in expected | found if name not in _NOT_COMPARED):
        if expected.get(field) != found.get(field):
            return Difference(field, None, None, repr(expected.get(field)), repr(found.get(field)))
    return None


def _compare_graph(
    checkpoint: Checkpoint, path: Path, model: onnx.ModelProto, info: ModelInfo, stored: dict[str, onnx.TensorProto]
) -> Difference | None:
    opset = next((o.version for o in model.opset_import if not o.domain), 0)
    try:
        graph = build_graph(checkpoint, info.form, info.embedding_type, opset, info.io_names, info.logits)
    except NotTernaryError as error:
        return Difference("checkpoint", None, None, "exactly ternary projections", str(error))
    if info.group_size != graph.info.group_size:
        return Difference("group_size", None, None, str(graph.info.group_size), str(info.group_size))
    expected = graph.skeleton
    for what in ("node", "input", "output", "value_info"):
        want, have = getattr(expected.graph, what), getattr(model.graph, what)
        for index, (one, other) in enumerate(zip(want, have, strict=False)):
            if one != other:
                return Difference(f"graph {what} {index}", None, None, _short(one), _short(other))
        if len(want) != len(have):
            return Difference(f"graph {what}s", None, None, str(len(want)), str(len(have)))
    if expected.ir_version != model.ir_version:
        return Difference("ir_version", None, None, str(expected.ir_version), str(model.ir_version))
    if list(expected.functions) != list(model.functions):
        return Difference("functions", None, None, "those this release writes", "others")
    if {(o.domain, o.version) for o in expected.opset_import} != {(o.domain, o.version) for o in model.opset_import}:
        return Difference("opset_import", None, None, str(expected.opset_import), str(model.opset_import))
    for tensor in graph.initializers:
        if tensor.name not in stored:
            return Difference(tensor.name, None, None, f"{tensor.dtype} {list(tensor.shape)}", "nothing")
        dims = list(stored[tensor.name].dims)
        if dims != list(tensor.shape):  # numpy would read a dimension of -1 as "whatever is left"
            return Difference(tensor.name, None, None, f"the shape {list(tensor.shape)}", f"{dims}")
        if tensor.name.startswith("const_"):  # the table of codes, zero points, axes, epsilon
            want, have = tensor.make(), stored_array(stored[tensor.name], path)
            if want.dtype != have.dtype or want.shape != have.shape or want.tobytes() != have.tobytes():
                return Difference(tensor.name, None, None, f"{want.dtype} {list(want.shape)}", "another constant")
    extra = set(stored) - {tensor.name for tensor in graph.initializers}
    return Difference(min(extra), None, None, "no such weight", "one") if extra else None


def _compare_tokenizer(checkpoint: Checkpoint, path: Path, tokenizer: Path | None) -> Difference | None:
    """The tokenizer asked for, or else the checkpoint's, if it has one, is the one beside the file."""
    source = tokenizer or checkpoint.tokenizer
    if source is None:
        return None
    beside, want = tokenizer_path(path), f"the text of {source}"
    expected = export_tokenizer(source, checkpoint.config, checkpoint.path).text
    if tokenizer is None and not beside.exists() and _written_without_tokenizer(path):
        return None
    if not beside.is_file():
        return Difference("tokenizer", None, None, f"{want} in {beside.name}", "no such file")
    try:
        if beside.read_bytes() == expected.encode():
            return None
    except OSError as error:
        raise OnnxError(f"{beside}: cannot be read: {error.strerror}") from None
    return Difference("tokenizer", None, None, want, f"another in {beside.name}")


def _short(proto: object) -> str:
    try:
        text = str(proto)
    except UnicodeDecodeError:  # protobuf before 5 does not show a damaged string
        text = repr(getattr(proto, "SerializeToString", bytes)())
    return " ".join(text.split())[:120]


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


def _compare_ternary(
    checkpoint: Checkpoint, path: Path, stored: dict[str, onnx.TensorProto], info: ModelInfo, name: str
) -> tuple[Difference | None, int, int]:
    expected = checkpoint.codes(name)
    n, k = expected.shape
    packed = _get(path, stored, f"{name}.codes", "u1", (n, k // 4))
    codes = np.stack([packed >> 2 * i & 3 for i in range(4)], axis=2).reshape(n, k).view(np.int8) - 1
    differs = codes != expected.codes
    if differs.any():
        row, column = first_true(differs)
        want = f"code {expected.codes[row, column]} in column {column}"
        return Difference(name, row, column // expected.group_size, want, f"{codes[row, column]}"), 0, 0
    stored_scales = stored[f"{name}.scales"]
    count = int(np.prod(stored_scales.dims, dtype=np.int64))
    dtype = "<f4" if info.form == "ort" else "<f2"
    scales = _get(path, stored, f"{name}.scales", dtype, (n, max(1, count // n)))
    # Both sides at one value a run of 64 weights, in fp32 (fp16 to fp32 is exact), whichever group is the wider one.
    wanted = np.repeat(expected.scales.astype(np.float32), expected.group_size // 64, axis=1)
    found = np.repeat(scales.astype(np.float32), k // 64 // scales.shape[1], axis=1)
    if wanted.shape != found.shape:
        return Difference(name, None, None, f"{wanted.size} scales", f"{found.size}"), 0, 0
    differs = wanted.view(np.uint32) != found.view(np.uint32)
    if differs.any():
        row, run = first_true(differs)
        place = (row, run * 64 // expected.group_size)
        return Difference(name, *place, f"scale {wanted[row, run]!r}", f"{found[row, run]!r}"), 0, 0
    return None, codes.size, scales.size


def _compare_small(
    checkpoint: Checkpoint, path: Path, stored: dict[str, onnx.TensorProto], tensor: ModelTensor
) -> Difference | None:
    expected, name = checkpoint.dense(tensor.hf).astype(np.float32, copy=False), initializer_name(tensor)
    if tensor.transform == NEG_EXP:
        expected = (-np.exp(expected.astype(np.float64))).astype(np.float32)
    found = _get(path, stored, name, "<f4", expected.shape)
    return _first_difference(name, expected, found, expected.view(np.uint32) == found.view(np.uint32))


def _compare_embedding(
    checkpoint: Checkpoint, path: Path, stored: dict[str, onnx.TensorProto], info: ModelInfo, name: str
) -> Difference | None:
    expected = checkpoint.dense(name).astype(np.float32, copy=False)
    if info.embedding_type == "f32":
        found = _get(path, stored, name, "<f4", expected.shape)
        return _first_difference(name, expected, found, expected.view(np.uint32) == found.view(np.uint32))
    if info.embedding_type == "f16":
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


def _written_without_tokenizer(path: Path) -> bool:
    """What `--no-tokenizer` leaves in the configuration beside the file."""
    try:
        return json.loads(config_path(path).read_text(encoding="utf-8")).get("tokenizer") is False
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
