"""Writing an ONNX file tensor by tensor: the model never is in memory as a whole.

The file is a protobuf ModelProto (onnx.proto): the graph's bytes without weights, then the weights as more of its
`initializer` fields; protobuf lets the elements of a repeated field come in any place. What would pass protobuf's limit
has its large weights in a second file (ONNX's external data).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import helper

from tmexport.files import atomic_write
from tmexport.onnx.builder import Initializer
from tmexport.onnx.graph import Graph
from tmexport.onnx.names import data_path
from tmexport.onnx.wire import tag

LARGEST_FILE = 2**31 - 1  # protobuf's limit, which onnxruntime shares
_SMALLEST_OUTSIDE = (
    1024  # bytes; smaller ones stay in the model, the sizes and axes that shape inference reads among them
)
_ALIGNMENT = 4096  # of weights in the second file: a page, so that onnxruntime can map them into memory

_MODEL_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_GRAPH_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_TENSOR_RAW = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


def write_model(
    path: Path, graph: Graph, on_tensor: Callable[[Initializer], None] = lambda tensor: None
) -> dict[Path, int]:
    """Write the model atomically; return the files and their sizes in bytes. `on_tensor` is called after each weight.

    There is one file, or a second one (`data_path`) if the first would pass LARGEST_FILE. The two are complete before
    either takes its name, the data first, and a model that still refers to older data is removed before that: whatever
    interrupts, no model meets another one's weights.

    Raises:
        TmexportError: a weight cannot be represented, or a file cannot be written; nothing is left behind.
    """
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.skeleton)
    shell.ClearField("graph")
    body = graph.skeleton.graph.SerializeToString()
    outside: dict[str, int] = {}
    heads = _heads(graph, path, outside)
    if _size(body, heads, graph, outside) + shell.ByteSize() > LARGEST_FILE - 16:
        outside = _offsets(graph)
        heads = _heads(graph, path, outside)
    with ExitStack() as stack:
        file = stack.enter_context(atomic_write(path))
        data = stack.enter_context(atomic_write(data_path(path))) if outside else file
        file.write(shell.SerializeToString())
        file.write(tag(_MODEL_GRAPH, _size(body, heads, graph, outside)))
        file.write(body)
        for tensor, head in zip(graph.initializers, heads, strict=True):
            at = outside.get(tensor.name)
            file.write(tag(_GRAPH_INITIALIZER, len(head) + (tensor.n_bytes if at is None else 0)))
            file.write(head)
            if at is not None:
                data.write(bytes(at - data.tell()))
            _write_array(file if at is None else data, tensor)
            on_tensor(tensor)
        sizes = {path: file.tell()}
        if outside:
            sizes[data_path(path)] = data.tell()
            file.flush()
            os.fsync(file.fileno())
            if data_path(path).exists():
                path.unlink(missing_ok=True)
    return sizes


def _offsets(graph: Graph) -> dict[str, int]:
    """Weight by name -> where it begins in the second file."""
    offsets, end = {}, 0
    for tensor in graph.initializers:
        if tensor.n_bytes >= _SMALLEST_OUTSIDE:
            offsets[tensor.name] = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = offsets[tensor.name] + tensor.n_bytes
    return offsets


def _size(body: bytes, heads: list[bytes], graph: Graph, outside: dict[str, int]) -> int:
    """Bytes of the graph: its nodes and every initializer that is inside."""
    total = len(body)
    for tensor, head in zip(graph.initializers, heads, strict=True):
        size = len(head) + (0 if tensor.name in outside else tensor.n_bytes)
        total += len(tag(_GRAPH_INITIALIZER, size)) + size
    return total


def _heads(graph: Graph, path: Path, outside: dict[str, int]) -> list[bytes]:
    """For each weight a TensorProto up to and including the length of its raw_data, or whole if its data is elsewhere."""
    heads = []
    for tensor in graph.initializers:
        kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
        proto = onnx.TensorProto(name=tensor.name, data_type=kind, dims=tensor.shape)
        if tensor.name not in outside:
            heads.append(proto.SerializeToString() + tag(_TENSOR_RAW, tensor.n_bytes))
            continue
        proto.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": data_path(path).name, "offset": outside[tensor.name], "length": tensor.n_bytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        heads.append(proto.SerializeToString())
    return heads


def _write_array(file: BinaryIO, tensor: Initializer) -> None:
    array = np.ascontiguousarray(tensor.make())
    assert array.dtype == tensor.dtype, tensor.name
    assert array.shape == tensor.shape or (array.size == 1 and tensor.shape == ()), tensor.name
    file.write(array.tobytes() if array.nbytes < 1 << 16 else array.data.cast("B"))
