"""A list of nodes that grows: the little that graphs and function bodies need beyond onnx.helper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

Dims = Sequence[int | str | None]


@dataclass(frozen=True)
class Initializer:
    """A weight to be written: its bytes (of a little-endian array of `dtype` and `shape`) are made when they are needed."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Builder:
    """Collects nodes, small constants and annotated shapes. `op` returns the name, or the names, of what it makes.

    Args:
        in_function: constants become Constant nodes (a function body holds no initialisers).
        inside: the scope of a body that sees the names around it (of Scan); its own must be others.
    """

    def __init__(self, in_function: bool = False, inside: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[Initializer] = []
        self.shapes: dict[str, onnx.ValueInfoProto] = {}
        self.scope = self._prefix = inside
        self._in_function = in_function
        self._constant_names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def name(self, what: str) -> str:
        """A new name in the current scope."""
        self._count += 1
        return f"{self.scope}{what}_{self._count}"

    def op(self, kind: str, *inputs: str, domain: str = "", out: str = "", dims: Dims | None = None, **attributes: object) -> str:  # fmt: skip
        """Append a node with one output. `out` names the output; `dims` annotates its shape (fp32)."""
        output = out or self.name(kind)
        self._append(kind, inputs, [output], domain, attributes)
        if dims is not None:
            self.annotate(output, dims)
        return output

    def ops(self, kind: str, *inputs: str, outputs: int | Sequence[str], domain: str = "", **attributes: object) -> list[str]:  # fmt: skip
        """Append a node with several outputs: a count of new ones, or their names ("" for one that is not wanted)."""
        names = [self.name(kind) for _ in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._append(kind, inputs, names, domain, attributes)
        return names

    def annotate(self, name: str, dims: Dims, dtype: int = onnx.TensorProto.FLOAT) -> None:
        self.shapes[name] = helper.make_tensor_value_info(name, dtype, list(dims))

    def ints(self, *values: int) -> str:
        """An int64 vector."""
        return self.const(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """An fp32 scalar."""
        return self.const(np.array(value, np.float32))

    def const(self, array: np.ndarray) -> str:
        """A small constant; equal ones are stored once."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constant_names:
            name = f"{self._prefix}const_{len(self._constant_names)}"
            self._constant_names[key] = name
            if self._in_function:
                value = numpy_helper.from_array(array, name)
                self.nodes.append(helper.make_node("Constant", [], [name], value=value))
            else:
                self.constants.append(Initializer(name, array.dtype, array.shape, lambda: array))
        return self._constant_names[key]

    def _append(self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str, attributes: dict) -> None:
        name = self.name(kind)
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))
