"""What is in a GGUF, an ONNX file or a checkpoint: dimensions, types, sizes, and the zero ratio of every ternary projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from tmexport.errors import NotTernaryError
from tmexport.extras import import_with
from tmexport.gguf.names import coded_kind, config_from_metadata, group_size_of
from tmexport.gguf.reader import open_gguf
from tmexport.model import Model
from tmexport.types import KINDS, decode_codes


@dataclass(frozen=True)
class TensorSummary:
    """One tensor: numpy-order shape, type, size; zero_ratio only where it is ternary."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    zero_ratio: float | None = None


@dataclass(frozen=True)
class Summary:
    """A model file at a glance."""

    path: str
    format: str
    config: Model
    group_size: int | None
    bytes: int
    parameters: int
    tensors: list[TensorSummary]
    onnx: dict[str, Any] | None = None  # of an ONNX file: form, opset, ...

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        types: dict[str, int] = {}
        for tensor in self.tensors:
            types[tensor.type] = types.get(tensor.type, 0) + tensor.bytes
        zeros = [t.zero_ratio for t in self.tensors if t.zero_ratio is not None]
        ternary = [t for t in self.tensors if t.zero_ratio is not None]
        weights = [int(np.prod(t.shape)) for t in ternary]
        mean = float(np.average(zeros, weights=weights)) if zeros else None
        return vars(self) | {
            "config": self.config.dimensions(),
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "bytes_by_type": types,
            "zero_ratio": mean,
        }


def inspect_path(path: Path, on_tensor: Callable[[str, int], None] = lambda name, total: None) -> Summary:
    """Summarise a GGUF file, an .onnx file or a checkpoint folder; every ternary code is read for the zero ratios.

    Raises:
        GGUFError, OnnxError, CheckpointError, ConfigError: it is none of them, or is damaged.
        UsageError: an .onnx file, and the package onnx is not installed.
    """
    if path.suffix == ".onnx" and not path.is_dir():
        return import_with("onnx", "tmexport.onnx.inspect").inspect_onnx(path, on_tensor)
    return _inspect_checkpoint(path, on_tensor) if path.is_dir() else _inspect_gguf(path, on_tensor)


def _inspect_gguf(path: Path, on_tensor: Callable[[str, int], None]) -> Summary:
    gguf = open_gguf(path)
    config = config_from_metadata(gguf)
    tensors = []
    for name, info in gguf.tensors.items():
        ratio = None
        if coded_kind(gguf, name) is not None:
            codes, _ = decode_codes(gguf.blocks(name), info.type, info.shape[-1], name)
            ratio = 1.0 - np.count_nonzero(codes) / codes.size
        tensors.append(TensorSummary(name, info.shape, info.type.name, info.nbytes, ratio))
        on_tensor(name, len(gguf.tensors))
    parameters = sum(int(np.prod(t.shape)) for t in tensors)
    return Summary(str(path), "GGUF", config, group_size_of(gguf), path.stat().st_size, parameters, tensors)


def _inspect_checkpoint(path: Path, on_tensor: Callable[[str, int], None]) -> Summary:
    checkpoint = open_checkpoint(path)
    shapes = expected_shapes(checkpoint.config)
    tensors, group_sizes = [], set()
    for name, shape in shapes.items():
        ratio = None
        parts = [name] if name in checkpoint.stored else [name + ".codes", name + ".scales"]
        kind, size = checkpoint.stored[parts[0]].dtype, sum(checkpoint.stored[part].n_bytes for part in parts)
        if name in checkpoint.config.projections or len(parts) == 2:
            try:
                tensor = checkpoint.codes(name)
                in_groups = not KINDS[tensor.kind].in_blocks
                ratio = tensor.zero_ratio if in_groups else None
                if name in checkpoint.config.projections:
                    group_sizes.add(tensor.group_size if in_groups else 0)
                kind = tensor.kind if len(parts) == 2 else f"{kind} (ternary)"
            except NotTernaryError:
                group_sizes.add(0)
        tensors.append(TensorSummary(name, shape, kind, size, ratio))
        on_tensor(name, len(shapes))
    label = f"{_kinds(checkpoint)} checkpoint".strip()
    parameters = sum(int(np.prod(shape)) for shape in shapes.values())
    total = sum(t.bytes for t in tensors)
    return Summary(str(path), label, checkpoint.config, min(group_sizes) or None, total, parameters, tensors)


def _kinds(checkpoint: Checkpoint) -> str:
    """The kinds of codes it holds: "ternary", "binary and ternary"; nothing for full precision."""
    return " and ".join(sorted({form.kind for form in checkpoint.coded.values()}))
