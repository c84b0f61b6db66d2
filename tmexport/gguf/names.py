"""A model as GGUF says it: keys and tensors (llama.cpp, gguf-py constants); what they are called is in tmexport.model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tmexport.errors import ConfigError, GGUFError
from tmexport.gguf.reader import GGUFFile
from tmexport.model import Model, ModelTensor
from tmexport.model.dialects import FAMILIES, family_of
from tmexport.model.dialects.reading import Keys
from tmexport.model.spec import NEG_EXP
from tmexport.types import KINDS, Coded, GGMLType, container, decode_codes, first_true, joined_scales

GROUP_SIZE_KEY = "tmexport.group_size"  # and tmexport.group_size.NAME of tensors, NAME after blk.N., with wider ones
INT4_KEY = (
    "tmexport.int4"  # beside a group size: the names, after blk.N., of tensors whose Q4_0 is int4 and not ternary
)
TOKENIZER_JSON_KEY = "tokenizer.huggingface.json"


def gguf_values(tensor: ModelTensor, values: np.ndarray) -> np.ndarray:
    """The values that the file holds: A = -exp(A_log), rows that RoPE turns interleaved, everything else as it is.

    The exponential is taken in fp64 and rounded once, so the bytes do not depend on the machine's fp32 exp.
    """
    if tensor.rotated is not None:
        return interleaved(values, tensor.rotated)
    if tensor.transform is None:
        return values
    assert tensor.transform == NEG_EXP, tensor.transform
    return (-np.exp(values.astype(np.float64))).astype(np.float32)


def gguf_codes(tensor: ModelTensor, coded: Coded) -> Coded:
    """The codes and scales that the file holds: rows in the file's order."""
    if tensor.rotated is None:
        return coded
    return replace(
        coded, codes=interleaved(coded.codes, tensor.rotated), scales=interleaved(coded.scales, tensor.rotated)
    )


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [n, ...] with the two halves of each of so many heads alternating (llama.cpp's converter, LlamaModel.permute)."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def model_metadata(
    model: Model, file_type: int, name: str, group_size: int | None, int4: Sequence[str] = ()
) -> dict[str, Any]:
    """The keys llama.cpp's loader needs, and ours. int4: see INT4_KEY."""
    metadata: dict[str, Any] = {
        "general.architecture": model.family,
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
    }
    metadata |= {f"{model.family}.{key}": value for key, value in family_of(model.family).to_gguf(model).items()}
    if group_size is not None:
        metadata[GROUP_SIZE_KEY] = group_size
        if int4:
            metadata[INT4_KEY] = list(int4)
    return metadata


def config_from_metadata(gguf: GGUFFile) -> Model:
    """The model in a GGUF, checked against its tensors.

    Raises:
        GGUFError: the file is of another architecture, or keys or tensors are missing or contradict each other.
    """
    try:
        family = family_of(gguf.metadata.get("general.architecture"))
    except ConfigError:
        found, expected = gguf.metadata.get("general.architecture"), " or ".join(map(repr, FAMILIES))
        raise GGUFError(f"{gguf.path}: general.architecture is {found!r}; expected {expected}") from None
    shapes = {name: info.shape for name, info in gguf.tensors.items()}
    try:
        model = family.from_gguf(Keys(gguf.path, gguf.metadata, shapes, family.name))
    except ConfigError as error:
        raise GGUFError(f"{gguf.path}: {error}") from None
    _check_tensors(gguf, model)
    return model


def tensor_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GGUF of these dimensions, numpy order."""
    return {tensor.gguf: tensor.gguf_shape for tensor in model.tensors.values()}


def _check_tensors(gguf: GGUFFile, model: Model) -> None:
    expected = {tensor.gguf: tensor for tensor in model.tensors.values()}
    for name, tensor in expected.items():
        info, shape = gguf.tensors.get(name), tensor.gguf_shape
        if info is None:
            raise GGUFError(f"{gguf.path}: has no tensor {name}; expected shape {list(shape)}")
        if info.shape != shape:
            raise GGUFError(f"{gguf.path}: {name} has the shape {list(info.shape)}; expected {list(shape)}")
        if not tensor.low_bit and container(info.type).kinds and container(info.type).encode_values is None:
            raise GGUFError(
                f"{gguf.path}: {name} is {info.type.name}; only matrices may be {container(info.type).kinds[0]}"
            )
        if not tensor.low_bit and info.type not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
            raise GGUFError(f"{gguf.path}: {name} is {info.type.name}; expected F32")
    extra = set(gguf.tensors) - set(expected)
    if extra:
        raise GGUFError(f"{gguf.path}: holds {min(extra)}, which a model of these dimensions does not have")


def coded_kind(gguf: GGUFFile, name: str) -> str | None:
    """The kind of codes with recorded groups that a tensor holds: that of its type; of a Q4_0, which holds values and int4
    blocks too, ternary inside the blocks of a file that records a group size. None: values, or blocks, which are as values.
    """
    found = container(gguf.tensors[name].type)
    kinds = [kind for kind in found.kinds if not KINDS[kind].in_blocks]
    if not kinds or (found.encode_values is not None and not _says_ternary(gguf, name)):
        return None
    return kinds[0]


def _says_ternary(gguf: GGUFFile, name: str) -> bool:
    if GROUP_SIZE_KEY not in gguf.metadata or not (name.startswith("blk.") and name.endswith(".weight")):
        return False
    blocks = gguf.metadata.get(INT4_KEY, ())
    return not (isinstance(blocks, Sequence) and name.split(".", 2)[-1] in list(blocks))


def coded_tensors(gguf: GGUFFile) -> dict[str, str]:
    """The kind of every tensor that holds codes, in file order."""
    return {name: kind for name in gguf.tensors if (kind := coded_kind(gguf, name)) is not None}


def group_sizes_of(gguf: GGUFFile) -> dict[str, int]:
    """The group size of every tensor that holds codes: as recorded, or the widest whose groups have equal scales.

    Tensors of one kind inside the blocks share one, but for those whose own is recorded.

    Raises:
        GGUFError: the recorded value is not a group size that the file's blocks can hold.
    """
    sizes: dict[str, int] = {}
    inside: dict[tuple[str, Any], list[str]] = {}
    for name, kind in coded_tensors(gguf).items():
        if name.startswith("blk."):
            inside.setdefault((kind, _recorded(gguf, name)), []).append(name)
        else:
            sizes[name] = _widest(gguf, [name], kind)
    for (kind, recorded), names in inside.items():
        sizes |= dict.fromkeys(names, _shared_group_size(gguf, names, kind, recorded))
    return sizes


def group_size_of(gguf: GGUFFile) -> int | None:
    """The group size of the blocks' codes (the narrowest, where kinds differ); None if they hold none. Raises: as above."""
    return min((size for name, size in group_sizes_of(gguf).items() if name.startswith("blk.")), default=None)


def _recorded(gguf: GGUFFile, name: str) -> Any:
    """What the file says of a tensor's group size: under its name after blk.N., or for all."""
    found = gguf.metadata.get(f"{GROUP_SIZE_KEY}.{name.split('.', 2)[-1]}", gguf.metadata.get(GROUP_SIZE_KEY))
    return found if isinstance(found, int | float | str | None) else repr(found)


def _shared_group_size(gguf: GGUFFile, names: list[str], kind: str, recorded: Any) -> int:
    sizes = KINDS[kind].group_sizes
    if recorded is None or (kind != "ternary" and recorded not in sizes):
        return _widest(gguf, names, kind)
    if isinstance(recorded, bool) or recorded not in sizes or not all(_divides(gguf, name, recorded) for name in names):
        raise GGUFError(f"{gguf.path}: {GROUP_SIZE_KEY} is {recorded!r}, which does not fit its {kind} tensors")
    for name in names:
        differs = _differing(gguf, name, recorded)
        if differs.any():
            row, group = first_true(differs)
            raise GGUFError(
                f"{gguf.path}: {name}, row {row}, group {group} has different scales, but the group size is {recorded}"
            )
    return recorded


def _widest(gguf: GGUFFile, names: list[str], kind: str) -> int:
    """The widest group size that every one of the tensors has."""
    sizes = KINDS[kind].group_sizes

    def fits(name: str, size: int) -> bool:
        return _divides(gguf, name, size) and not _differing(gguf, name, size).any()

    for size in sizes:
        if all(fits(name, size) for name in names):
            return size
    name = next(name for name in names if not fits(name, sizes[-1]))
    raise GGUFError(
        f"{gguf.path}: {name} has rows that do not divide into groups as other tensors' do, or scales that differ"
    )


def _divides(gguf: GGUFFile, name: str, size: int) -> bool:
    """Whether a tensor's rows divide into groups of `size`, and those into its blocks."""
    info = gguf.tensors[name]
    return info.shape[-1] % size == 0 and size % info.type.block_size == 0


def _differing(gguf: GGUFFile, name: str, size: int) -> np.ndarray:
    """Where the blocks of a group do not repeat one scale: whoever keeps one scale a group would compute something else."""
    info = gguf.tensors[name]
    if size == info.type.block_size:
        return np.zeros((1, 1), bool)
    _, scales = decode_codes(gguf.blocks(name), info.type, info.shape[-1], name)
    return joined_scales(scales.view(np.uint16), size // info.type.block_size)[1]
