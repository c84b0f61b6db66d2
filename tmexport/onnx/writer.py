"""Writing an ONNX file tensor by tensor: the model never is in memory as a whole.

The file is a protobuf ModelProto (onnx.proto): the graph's bytes without weights, then the weights as more of its
`initializer` fields; protobuf lets the elements of a repeated field come in any place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import helper

from tmexport.files import atomic_write
from tmexport.onnx.builder import Initializer
from tmexport.onnx.graph import Graph

_LENGTH_DELIMITED = 2
_MODEL_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_GRAPH_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_TENSOR_RAW = onnx.TensorProto.DESCRIPTOR.fields_by_name["raw_data"].number


def write_model(path: Path, graph: Graph, on_tensor: Callable[[Initializer], None] = lambda tensor: None) -> int:
    """Write the file atomically and return its size in bytes; `on_tensor` is called after each weight.

    Raises:
        TmexportError: a weight cannot be represented, or the file cannot be written; nothing is left behind.
    """
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.skeleton)
    shell.ClearField("graph")
    body = graph.skeleton.graph.SerializeToString()
    heads = [_tensor_head(tensor) for tensor in graph.initializers]
    sizes = [len(head) + tensor.n_bytes for head, tensor in zip(heads, graph.initializers, strict=True)]
    total = len(body) + sum(len(_tag(_GRAPH_INITIALIZER, size)) + size for size in sizes)
    with atomic_write(path) as file:
        file.write(shell.SerializeToString())
        file.write(_tag(_MODEL_GRAPH, total))
        file.write(body)
        for tensor, head, size in zip(graph.initializers, heads, sizes, strict=True):
            file.write(_tag(_GRAPH_INITIALIZER, size))
            file.write(head)
            _write_array(file, tensor)
            on_tensor(tensor)
        return file.tell()


def _tensor_head(tensor: Initializer) -> bytes:
    """A TensorProto up to and including the length of its raw_data."""
    kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    proto = onnx.TensorProto(name=tensor.name, data_type=kind, dims=tensor.shape)
    return proto.SerializeToString() + _tag(_TENSOR_RAW, tensor.n_bytes)


def _write_array(file: BinaryIO, tensor: Initializer) -> None:
    array = np.ascontiguousarray(tensor.make())
    assert array.dtype == tensor.dtype, tensor.name
    assert array.shape == tensor.shape or (array.size == 1 and tensor.shape == ()), tensor.name
    file.write(array.tobytes() if array.nbytes < 1 << 16 else memoryview(array).cast("B"))


def _tag(field: int, length: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
