"""A checkpoint as a GGUF: the plan (what goes in, as which type, how large), then the file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.checkpoint import Checkpoint, group_that_keeps, kept, shared_group_size
from tmexport.errors import NotTernaryError, ScaleError, UsageError
from tmexport.gguf.names import GROUP_SIZE_KEY, gguf_codes, gguf_values, model_metadata
from tmexport.gguf.writer import PlannedTensor, file_bytes, write_gguf
from tmexport.model import Model, ModelTensor
from tmexport.tokenizer.gguf import export_tokenizer, without_tokenizer
from tmexport.tokenizer.names import harmless_name
from tmexport.types import (
    CONTAINERS,
    FILE_TYPES,
    KINDS,
    GGMLType,
    encode_codes,
    encode_values,
    smallest_exact,
    tells,
)

# what --type and --embedding-type offer: a type that holds codes or F16, and those that values are rounded into
TYPES = {kind.name.lower(): kind for kind, c in CONTAINERS.items() if c.kinds} | {"f16": GGMLType.F16}
EMBEDDING_TYPES = {"f16": GGMLType.F16, "q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}


@dataclass(frozen=True)
class ExportPlan:
    """Everything that will be in the file; `warnings`: what it cannot say of the tokenizer, a sentence each; `reasons`: why a
    role's type is not the smallest that its kind of codes has.
    """

    kind: GGMLType
    group_size: int | None
    metadata: dict[str, Any]
    tensors: list[PlannedTensor]
    warnings: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

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
    embedding: str = "auto",
    ptq: bool = False,
    tokenizer: Path | None = None,
    ids_only: bool = False,
) -> ExportPlan:
    """Decide every tensor's type; reads weights only as far as `auto` must to know the smallest exact type.

    Args:
        checkpoint: of any dialect.
        kind: auto, or a key of TYPES, for the projections of the blocks.
        embedding: auto (F16, or the smallest exact type for one that is codes), or a key of EMBEDDING_TYPES, for the
            embedding and an untied head.
        ptq: round weights that are not ternary to nearest; the only lossy path.
        tokenizer: a tokenizer.json to use instead of the checkpoint's.
        ids_only: leave the tokenizer out on purpose.

    Raises:
        NotTernaryError: `auto` or a type of codes on weights that it does not hold exactly, without `ptq`.
        UsageError: the dimensions do not divide into the type's blocks.
    """
    config = checkpoint.config
    types, groups = _projection_types(checkpoint, kind, ptq)
    group_size = min(groups.values(), default=None)
    by_role = dict(types)
    for tensor in config.tensors.values():
        if tensor.low_bit and tensor.block is None:
            by_role[tensor.role] = _embedding_type(checkpoint, tensor, kind, embedding)
    layout = tensor_layout(config, by_role)
    tensors = []
    for tensor in config.tensors.values():
        shape, tensor_kind = layout[tensor.gguf]
        if tensor.role in groups:
            make = partial(_projection, checkpoint, tensor.hf, tensor_kind, groups[tensor.role], ptq)
        elif (codes := checkpoint.kind(tensor.hf)) is not None and tells(tensor_kind, codes):
            make = partial(_codes, checkpoint, tensor.hf, tensor_kind)
        else:
            make = partial(_float, checkpoint, tensor, tensor_kind)
        tensors.append(PlannedTensor(tensor.gguf, shape, tensor_kind, make))
    name = checkpoint.path.resolve().name.encode("utf-8", "replace").decode()  # a folder's name can be any bytes
    chosen = next(iter(types.values()))
    metadata = model_metadata(config, FILE_TYPES[chosen], harmless_name(name), group_size, _int4(checkpoint, types))
    metadata |= {f"{GROUP_SIZE_KEY}.{name}": size for name, size in _wider(config, groups).items()}
    source, reasons = tokenizer or checkpoint.tokenizer, _reasons(config, types, groups) if kind == "auto" else ()
    if ids_only:
        exported = without_tokenizer(config)
        return ExportPlan(chosen, group_size, metadata | exported.metadata, tensors, exported.warnings, reasons)
    if source is None:
        metadata["tokenizer.ggml.model"] = "none"
        return ExportPlan(chosen, group_size, metadata, tensors, reasons=reasons)
    exported = export_tokenizer(source, config, checkpoint.path)
    return ExportPlan(chosen, group_size, metadata | exported.metadata, tensors, exported.sentences(), reasons)


def _reasons(model: Model, types: Mapping[str, GGMLType], groups: Mapping[str, int]) -> tuple[str, ...]:
    """A sentence for each role whose groups or rows are too short for the widest block."""
    rows = {tensor.role: tensor.shape[1] for tensor in model.tensors.values() if tensor.role in groups}
    return tuple(
        f"{role} is {types[role].name}: rows of {rows[role]} in groups of {group} have no smaller type"
        for role, group in groups.items()
        if types[role].block_size < 256
    )


def _wider(model: Model, groups: Mapping[str, int]) -> dict[str, int]:
    """The group sizes that are not the smallest, by what a tensor is called after blk.N."""
    smallest = min(groups.values(), default=None)
    tensors = [tensor for tensor in model.tensors.values() if groups.get(tensor.role, smallest) != smallest]
    return {tensor.gguf.split(".", 2)[-1]: groups[tensor.role] for tensor in tensors}


def _int4(checkpoint: Checkpoint, types: Mapping[str, GGMLType]) -> list[str]:
    """Names, after blk.N., of the projections that are int4 in a Q4_0."""
    projections = [tensor for tensor in checkpoint.config.tensors.values() if tensor.role in types]
    found = [t for t in projections if types[t.role] is GGMLType.Q4_0 and checkpoint.kind(t.hf) == "int4"]
    return list(dict.fromkeys(t.gguf.split(".", 2)[-1] for t in found))


def tensor_layout(model: Model, types: Mapping[str, GGMLType]) -> dict[str, tuple[tuple[int, ...], GGMLType]]:
    """The shape (numpy order) and type of every tensor in the file, by its GGUF name.

    Args:
        model: the dimensions.
        types: of the matrices that may be low-bit, by role; other matrices are F16, and everything else is F32.

    Raises:
        UsageError: the rows of a matrix do not divide into its type's blocks.
    """
    layout = {}
    for tensor in model.tensors.values():
        shape = tensor.gguf_shape
        kind = types[tensor.role] if tensor.low_bit else GGMLType.F16 if tensor.matrix else GGMLType.F32
        if shape[-1] % kind.block_size:
            if tensor.block is None:
                raise UsageError(f"embedding rows of {shape[-1]} do not divide into {kind.name} blocks; use f16")
            raise UsageError(
                f"rows of {shape[-1]} weights do not divide into {kind.name} blocks of {kind.block_size}; use --type q2_0"
            )
        layout[tensor.gguf] = (shape, kind)
    return layout


def low_bit_types(model: Model, kind: GGMLType, embedding: GGMLType) -> dict[str, GGMLType]:
    """For `tensor_layout`: one type for all projections, and one for the embedding and an untied head."""
    return {t.role: kind if t.block is not None else embedding for t in model.tensors.values() if t.low_bit}


def _projection_types(checkpoint: Checkpoint, kind: str, ptq: bool) -> tuple[dict[str, GGMLType], dict[str, int]]:
    """The type of each role's projections, and the group size of each role of codes in groups.

    A role that is dense in a checkpoint where others are codes stays dense: F16.
    """
    config = checkpoint.config
    names: dict[str, list[str]] = {}
    for name in config.projections:
        names.setdefault(config.tensors[name].role, []).append(name)
    if kind == "f16":
        return dict.fromkeys(names, GGMLType.F16), {}
    has_codes = any(checkpoint.kind(found[0]) is not None for found in names.values())
    chosen, groups = {}, {}
    for role, found in names.items():
        codes = checkpoint.kind(found[0])
        if codes is None and has_codes and not ptq:
            chosen[role] = GGMLType.F16
            continue
        codes = codes or "ternary"
        if ptq and codes == "ternary":
            ternary = [name for name in config.projections if checkpoint.kind(name) in (None, "ternary")]
            rows = {config.tensors[name].shape[1] for name in config.projections}
            group = min(_group_for_rounding(rows), _group_to_keep(checkpoint, ternary, kind))
        else:
            try:
                group = shared_group_size(checkpoint, found, codes)
            except NotTernaryError as error:
                raise _refusal(error) from None
        if not KINDS[codes].in_blocks:
            groups[role] = group
        chosen[role] = _type_of_codes(role, codes, group, kind, {config.tensors[name].shape[1] for name in found})
    return chosen, groups


def _type_of_codes(role: str, codes: str, group: int, kind: str, rows: set[int]) -> GGMLType:
    found = TYPES[kind] if kind != "auto" else smallest_exact(codes, group, rows)
    if found is None:
        raise UsageError(f"{codes} rows of {sorted(rows)} fit no type in groups of {group}; use --type f16")
    if codes not in CONTAINERS[found].kinds:
        fitting = ", ".join(c.type.name.lower() for c in CONTAINERS.values() if codes in c.kinds)
        raise UsageError(
            f"{role} is {codes}, which {found.name} does not hold exactly; use --type auto, {fitting} or f16"
        )
    return found


def _group_to_keep(checkpoint: Checkpoint, names: list[str], kind: str) -> int:
    """The widest group that keeps what is ternary already; no narrower than a block of the type asked for."""
    block = TYPES[kind].block_size if kind != "auto" else 0
    return max(block, group_that_keeps(checkpoint, names, "ternary"))


def _group_for_rounding(rows: set[int]) -> int:
    """The widest group of ternary weights that divides all rows."""
    for size in KINDS["ternary"].group_sizes:
        if all(k % size == 0 for k in rows):
            return size
    raise UsageError(f"rows of {' and '.join(map(str, sorted(rows)))} do not divide into groups of 64")


def _embedding_type(checkpoint: Checkpoint, tensor: ModelTensor, kind: str, embedding: str) -> GGMLType:
    """Of the embedding or an untied head: as asked for, else F16, or the smallest type that holds its codes."""
    form = checkpoint.form(tensor.hf)
    if embedding != "auto":
        return EMBEDDING_TYPES[embedding]
    if form is None or kind == "f16":
        return GGMLType.F16
    asked = TYPES.get(kind)  # not a Q4_0: outside the blocks nothing would tell its codes from rounded values
    if asked and tells(asked, form.kind) and form.group_size % asked.block_size == 0:
        return asked
    return smallest_exact(form.kind, form.group_size, [tensor.shape[1]]) or GGMLType.F16


def _refusal(error: NotTernaryError) -> NotTernaryError:
    if isinstance(error, ScaleError):  # says what to do by itself
        return error
    return NotTernaryError(
        f"{error}; train it with `python -m qat.train`, export it as it is with --type f16, "
        "or round it with --ptq rtn, which loses quality"
    )


def _codes(checkpoint: Checkpoint, name: str, kind: GGMLType) -> np.ndarray:
    return encode_codes(gguf_codes(checkpoint.config.tensors[name], checkpoint.codes(name)), kind, name)


def _projection(checkpoint: Checkpoint, name: str, kind: GGMLType, group_size: int, ptq: bool) -> np.ndarray:
    if not ptq or checkpoint.kind(name) not in (None, "ternary"):
        try:
            return _codes(checkpoint, name, kind)
        except NotTernaryError as error:
            raise _refusal(error) from None
    try:
        tensor = kept(checkpoint, name, "ternary", max(kind.block_size, group_size))
    except NotTernaryError:  # its groups are smaller than a block of the type that was asked for
        tensor = None
    tensor = tensor or KINDS["ternary"].quantize(checkpoint.dense(name), group_size)
    return encode_codes(gguf_codes(checkpoint.config.tensors[name], tensor), kind, name)


def _float(checkpoint: Checkpoint, tensor: ModelTensor, kind: GGMLType) -> np.ndarray:
    values = gguf_values(tensor, checkpoint.values(tensor.hf)).reshape(-1, tensor.gguf_shape[-1])
    return encode_values(values, kind, tensor.hf)
