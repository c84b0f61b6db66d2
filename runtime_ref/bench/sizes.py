"""How large the same model would be in every type."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from tmexport.errors import UsageError
from tmexport.gguf.export import EMBEDDING_TYPES, TYPES, low_bit_types, tensor_layout
from tmexport.gguf.names import GROUP_SIZE_KEY, config_from_metadata, model_metadata
from tmexport.gguf.reader import GGUFFile
from tmexport.gguf.writer import PlannedTensor, file_bytes
from tmexport.types import FILE_TYPES, GGMLType

COMBINATIONS = [("f16", "f16"), *((kind, e) for kind in ("tq1_0", "tq2_0", "q2_0") for e in ("f16", "q8_0"))]


def file_sizes(gguf: GGUFFile) -> list[dict[str, Any]]:
    """{"type", "embedding", "bytes"} of every combination that `tmexport gguf` could write of this model's dimensions.

    bytes is what `tmexport gguf --dry-run` says for a model of the same name and tokenizer; None where the type cannot
    hold it (rows that do not divide into blocks, or groups of less than 256 in TQ1_0 and TQ2_0).
    """
    return [
        {"type": TYPES[kind].name, "embedding": EMBEDDING_TYPES[embedding].name,
         "bytes": _size(gguf, TYPES[kind], EMBEDDING_TYPES[embedding])}
        for kind, embedding in COMBINATIONS
    ]  # fmt: skip


def _size(gguf: GGUFFile, kind: GGMLType, embedding: GGMLType) -> int | None:
    config = config_from_metadata(gguf)
    group = gguf.metadata.get(GROUP_SIZE_KEY, 256)
    if any(config.tensors[name].shape[-1] % kind.block_size for name in config.projections):
        return None
    if kind.block_size == 256 and group != 256:
        return None
    try:
        layout = tensor_layout(config, low_bit_types(config, kind, embedding))
    except UsageError:
        return None
    tensors = [PlannedTensor(name, shape, of, _nothing) for name, (shape, of) in layout.items()]
    name = str(gguf.metadata.get("general.name", ""))
    own = model_metadata(config, FILE_TYPES[kind], name, None if kind is GGMLType.F16 else group)
    rest = {key: value for key, value in gguf.metadata.items() if key not in own and key != GROUP_SIZE_KEY}
    try:
        return file_bytes(own | rest, tensors)
    except struct.error:  # another program's file, with arrays that ours never hold: as long a header as it has
        header = min(info.offset for info in gguf.tensors.values())
        return header + file_bytes({}, tensors) - file_bytes({}, [])


def _nothing() -> np.ndarray:
    raise AssertionError("only sizes are asked for")
