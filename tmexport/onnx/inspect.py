"""What is in a file written by `tmexport onnx`: the part of `tmexport inspect` that needs onnx."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from tmexport.inspect import Summary, TensorSummary
from tmexport.onnx.names import OnnxError
from tmexport.onnx.verify import load_onnx
from tmexport.onnx.verify_weights import data_file, stored_array
from tmexport.onnx.weights import LAYOUTS, initializer_name

_ZERO_CODES = np.array([sum(byte >> shift & 3 == 1 for shift in (0, 2, 4, 6)) for byte in range(256)])  # by byte


def inspect_onnx(path: Path, on_tensor: Callable[[str, int], None]) -> Summary:
    """Summarise a file; weights have their names and shapes in the checkpoint, and every ternary code is read.

    Raises:
        OnnxError: there is no such file, it is damaged, another program wrote it, or a weight of its model is missing.
    """
    model, info = load_onnx(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors = []
    for name, tensor in info.config.tensors.items():
        found, shape = initializer_name(tensor), tensor.shape
        parts = [found] if found in stored else [f"{found}.codes", f"{found}.scales"]
        if any(part not in stored for part in parts):
            raise OnnxError(f"{path}: has no {found}; the file is damaged, or not the model its metadata describes")
        kinds = [_type_name(stored[part].data_type) for part in parts]
        kind, zero_ratio = kinds[0], None
        form = info.weights.get(tensor.role)
        if form is not None and len(parts) == 1:
            raise OnnxError(f"{path}: {found} is {kinds[0]}; expected {form.kind} codes and scales")
        if form is not None and LAYOUTS[form.kind].bits == 2:
            codes = stored_array(stored[parts[0]], path)
            if codes.dtype != np.uint8 or codes.size * 4 != math.prod(shape):
                raise OnnxError(f"{path}: {found} is {kinds[0]} {list(codes.shape)}; expected four codes a byte of {list(shape)}")  # fmt: skip
            kind, zero_ratio = f"2-bit + {kinds[1]}", float(_ZERO_CODES[codes].sum() / math.prod(shape))
        elif len(parts) == 2:
            kind = f"{LAYOUTS[form.kind].bits if form else 8}-bit + {kinds[1]}"
        size = sum(_n_bytes(stored.pop(part)) for part in parts)
        tensors.append(TensorSummary(found, shape, kind, size, zero_ratio))
        on_tensor(name, len(info.config.tensors))
    if stored:
        names = sorted(stored)
        tensors.append(TensorSummary(f"{len(names)} constants", (), "", sum(_n_bytes(stored[n]) for n in names)))
    files = [path, *sorted({data_file(t, path) for t in model.graph.initializer if _is_outside(t)})]
    about = {
        "form": info.form,
        "embedding_type": info.embedding_type,
        "logits": info.logits,
        "io_names": info.io_names,
        "opset": {o.domain or "ai.onnx": o.version for o in model.opset_import},
        "ir_version": model.ir_version,
        "nodes": len(model.graph.node),
        "functions": [f"{function.domain}.{function.name}" for function in model.functions],
        "files": [str(file) for file in files],
    }
    total = sum(file.stat().st_size for file in files)
    parameters = sum(math.prod(tensor.shape) for tensor in info.config.tensors.values())
    return Summary(str(path), "ONNX", info.config, info.group_size, total, parameters, tensors, about)


def _type_name(kind: onnx.TensorProto.DataType) -> str:
    """In the words of `tmexport inspect`; the number of a type that no file of ours has."""
    return {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.FLOAT16: "F16", onnx.TensorProto.UINT8: "U8", onnx.TensorProto.INT8: "I8"}.get(kind, f"type {kind}")  # fmt: skip


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _n_bytes(tensor: onnx.TensorProto) -> int:
    if _is_outside(tensor):
        return sum(
            int(entry.value) for entry in tensor.external_data if entry.key == "length" and entry.value.isdigit()
        )
    return len(tensor.raw_data)
