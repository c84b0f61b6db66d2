"""A checkpoint as a GGUF: the plan (what goes in, as which type, how large), then the file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.checkpoint import Checkpoint, projection_names
from tmexport.errors import NotTernaryError, UsageError
from tmexport.gguf.encode import encode_float, encode_ternary, scales_per_block
from tmexport.gguf.names import gguf_values, model_metadata
from tmexport.gguf.types import FILE_TYPES, GGMLType
from tmexport.gguf.writer import PlannedTensor, file_bytes, write_gguf
from tmexport.model import Model, ModelTensor
from tmexport.ternary import GROUP_SIZES, TernaryTensor, quantize_absmean
from tmexport.tokenizer.gguf import export_tokenizer, without_tokenizer
from tmexport.tokenizer.names import harmless_name

TYPES = {"tq1_0": GGMLType.TQ1_0, "tq2_0": GGMLType.TQ2_0, "q2_0": GGMLType.Q2_0, "f16": GGMLType.F16}
EMBEDDING_TYPES = {"f16": GGMLType.F16, "q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}


@dataclass(frozen=True)
class ExportPlan:
    """Everything that will be in the file; `warnings`: what it cannot say of the tokenizer, a sentence each."""

    kind: GGMLType
    group_size: int | None
    metadata: dict[str, Any]
    tensors: list[PlannedTensor]
    warnings: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """The size of the file."""
        return file_bytes(self.metadata, self.tensors)

    @property
    def n_bytes_fp16(self) -> int:
        """What the same parameters take in fp16."""
        return 2 * sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors)

    def write(self, path: Path, on_tensor: Callable[[PlannedTensor], None]) -> int:
        """Write the file atomically; returns its size in bytes."""
        return write_gguf(path, self.metadata, self.tensors, on_tensor)


def plan_export(
    checkpoint: Checkpoint,
    kind: str = "auto",
    embedding: str = "f16",
    ptq: bool = False,
    tokenizer: Path | None = None,
    ids_only: bool = False,
) -> ExportPlan:
    """Decide every tensor's type; reads weights only as far as `auto` must to know the smallest exact type.

    Args:
        checkpoint: of any dialect.
        kind: auto, or a key of TYPES, for in_proj and out_proj.
        embedding: a key of EMBEDDING_TYPES, for the embedding and an untied head.
        ptq: round weights that are not ternary to nearest; the only lossy path.
        tokenizer: a tokenizer.json to use instead of the checkpoint's.
        ids_only: leave the tokenizer out on purpose.

    Raises:
        NotTernaryError: `auto` or a ternary type on weights that are not exactly ternary, without `ptq`.
        UsageError: the dimensions do not divide into the type's blocks.
    """
    config = checkpoint.config
    if kind == "f16":
        group_size = None
    elif ptq:
        group_size = next((g for g in GROUP_SIZES if config.d_model % g == 0 and config.d_inner % g == 0), None)
        if group_size is None:
            raise UsageError(f"d_model {config.d_model} and d_inner {config.d_inner} do not divide into groups of 64")
    else:
        group_size = _shared_group_size(checkpoint)
    chosen = TYPES.get(kind, GGMLType.TQ1_0 if group_size == 256 else GGMLType.Q2_0)
    for k in (config.d_model, config.d_inner):
        if k % chosen.block_size:
            raise UsageError(
                f"rows of {k} weights do not divide into {chosen.name} blocks of {chosen.block_size}; use --type q2_0"
            )
    tensors = []
    layout = tensor_layout(config, chosen, EMBEDDING_TYPES[embedding])
    for tensor in config.tensors.values():
        shape, tensor_kind = layout[tensor.gguf]
        if tensor.hf in config.projections:
            make = partial(_projection, checkpoint, tensor.hf, chosen, group_size, ptq)
        else:
            make = partial(_float, checkpoint, tensor, tensor_kind)
        tensors.append(PlannedTensor(tensor.gguf, shape, tensor_kind, make))
    name = checkpoint.path.resolve().name.encode("utf-8", "replace").decode()  # a folder's name can be any bytes
    metadata = model_metadata(config, FILE_TYPES[chosen], harmless_name(name), group_size)
    source = tokenizer or checkpoint.tokenizer
    if ids_only:
        exported = without_tokenizer(config)
        return ExportPlan(chosen, group_size, metadata | exported.metadata, tensors, exported.warnings)
    if source is None:
        return ExportPlan(chosen, group_size, metadata | {"tokenizer.ggml.model": "none"}, tensors)
    exported = export_tokenizer(source, config, checkpoint.path)
    return ExportPlan(chosen, group_size, metadata | exported.metadata, tensors, exported.sentences())


def tensor_layout(config: Model, kind: GGMLType, embedding: GGMLType) -> dict[str, tuple[tuple[int, ...], GGMLType]]:
    """The shape (numpy order) and type of every tensor in the file, by its GGUF name.

    Args:
        config: the dimensions.
        kind: of in_proj and out_proj.
        embedding: of the embedding and an untied head; everything else is F32.

    Raises:
        UsageError: the embedding's rows do not divide into the type's blocks.
    """
    layout = {}
    for tensor in config.tensors.values():
        shape = tensor.gguf_shape
        if tensor.hf in config.projections:
            tensor_kind = kind
        else:
            tensor_kind = embedding if tensor.low_bit else GGMLType.F32
            if shape[-1] % tensor_kind.block_size:
                raise UsageError(f"embedding rows of {shape[-1]} do not divide into {tensor_kind.name} blocks; use f16")
        layout[tensor.gguf] = (shape, tensor_kind)
    return layout


def _shared_group_size(checkpoint: Checkpoint) -> int:
    """The widest group for which every projection is exactly ternary: 256 where scales inside a block agree."""
    widest = GROUP_SIZES[0]
    for name in projection_names(checkpoint.config):
        if checkpoint.group_size == widest:
            return widest
        try:
            widest = min(widest, _widest_group(checkpoint.ternary(name), name))
        except NotTernaryError as error:
            raise _refusal(error) from None
    return widest


def _refusal(error: NotTernaryError) -> NotTernaryError:
    return NotTernaryError(
        f"{error}; train it with `python -m qat.train`, export it as it is with --type f16, "
        "or round it with --ptq rtn, which loses quality"
    )


def _widest_group(tensor: TernaryTensor, name: str) -> int:
    for block in GROUP_SIZES:
        if tensor.shape[1] % block:
            continue
        try:
            scales_per_block(tensor, block, name)
        except NotTernaryError:
            continue
        return block
    raise AssertionError("a tensor's own group size always fits")


def _projection(checkpoint: Checkpoint, name: str, kind: GGMLType, group_size: int | None, ptq: bool) -> np.ndarray:
    if kind is GGMLType.F16:
        return encode_float(checkpoint.values(name), kind, name)
    if ptq:
        assert group_size is not None
        try:  # a weight that already is ternary stays as it is
            tensor = checkpoint.ternary(name)
            scales_per_block(tensor, max(kind.block_size, group_size), name)
        except NotTernaryError:
            tensor = quantize_absmean(checkpoint.dense(name), group_size)
        return encode_ternary(tensor, kind, name)
    try:
        return encode_ternary(checkpoint.ternary(name), kind, name)
    except NotTernaryError as error:
        raise _refusal(error) from None


def _float(checkpoint: Checkpoint, tensor: ModelTensor, kind: GGMLType) -> np.ndarray:
    values = gguf_values(tensor, checkpoint.values(tensor.hf)).reshape(-1, tensor.gguf_shape[-1])
    return encode_float(values, kind, tensor.hf)
