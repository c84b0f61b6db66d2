"""A model as GGUF says it: keys and tensors (llama.cpp, gguf-py constants); what they are called is in tmexport.model."""

from __future__ import annotations

from typing import Any

import numpy as np

from tmexport.errors import ConfigError, GGUFError
from tmexport.gguf.decode import decode_ternary
from tmexport.gguf.reader import GGUFFile
from tmexport.gguf.types import GGMLType
from tmexport.model import Model, ModelTensor
from tmexport.model.dialects import FAMILIES, family_of
from tmexport.model.dialects.reading import Keys
from tmexport.model.spec import NEG_EXP
from tmexport.ternary import GROUP_SIZES, first_true

GROUP_SIZE_KEY = "tmexport.group_size"
TOKENIZER_JSON_KEY = "tokenizer.huggingface.json"


def gguf_values(tensor: ModelTensor, values: np.ndarray) -> np.ndarray:
    """The values that the file holds: A = -exp(A_log), everything else as it is.

    The exponential is taken in fp64 and rounded once, so the bytes do not depend on the machine's fp32 exp.
    """
    if tensor.transform is None:
        return values
    assert tensor.transform == NEG_EXP, tensor.transform
    return (-np.exp(values.astype(np.float64))).astype(np.float32)


def model_metadata(model: Model, file_type: int, name: str, group_size: int | None) -> dict[str, Any]:
    """The keys llama.cpp's loader needs, and ours."""
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
        if info.type.is_ternary and (not tensor.low_bit or tensor.block is None):
            raise GGUFError(f"{gguf.path}: {name} is {info.type.name}; only ssm_in and ssm_out may be ternary")
        if not tensor.low_bit and info.type not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
            raise GGUFError(f"{gguf.path}: {name} is {info.type.name}; expected F32")
    extra = set(gguf.tensors) - set(expected)
    if extra:
        raise GGUFError(f"{gguf.path}: holds {min(extra)}, which a model of these dimensions does not have")


def ternary_tensors(gguf: GGUFFile) -> list[str]:
    """Names of the tensors stored in a ternary type, in file order."""
    return [name for name, info in gguf.tensors.items() if info.type.is_ternary]


def group_size_of(gguf: GGUFFile) -> int | None:
    """The group size of the weights: as recorded, or the widest whose groups have equal scales; None if none is ternary.

    Raises:
        GGUFError: the recorded value is not a group size that the file's blocks can hold.
    """
    names = ternary_tensors(gguf)
    if not names:
        return None
    recorded = gguf.metadata.get(GROUP_SIZE_KEY)
    wide_blocks = any(gguf.tensors[name].type is not GGMLType.Q2_0 for name in names)
    if recorded is not None:
        fits = all(gguf.tensors[name].shape[-1] % recorded == 0 for name in names) if recorded in GROUP_SIZES else False
        if not fits or (wide_blocks and recorded != 256):
            raise GGUFError(f"{gguf.path}: {GROUP_SIZE_KEY} is {recorded!r}, which does not fit its ternary tensors")
        _check_scales_agree(gguf, names, recorded)
        return recorded
    if wide_blocks:
        for name in names:
            if gguf.tensors[name].shape[-1] % 256:
                raise GGUFError(
                    f"{gguf.path}: {name} has rows that do not divide into groups of 256, as other tensors' do"
                )
        _check_scales_agree(gguf, names, 256)
        return 256
    size = 256
    for name in names:
        info = gguf.tensors[name]
        _, scales = decode_ternary(gguf.blocks(name), info.type, info.shape[-1], name)
        while size > 64:
            per_group = size // 64
            fits = info.shape[-1] % size == 0
            if fits and (scales.reshape(len(scales), -1, per_group) == scales[:, ::per_group, None]).all():
                break
            size //= 2
    return size


def _check_scales_agree(gguf: GGUFFile, names: list[str], group_size: int) -> None:
    """The Q2_0 blocks of a group must repeat one scale, or whoever keeps one scale a group computes something else."""
    for name in names:
        if gguf.tensors[name].type is not GGMLType.Q2_0:
            continue
        n, k = gguf.tensors[name].shape
        blocks = gguf.blocks(name).reshape(n, k // group_size, group_size // 64, GGMLType.Q2_0.block_bytes)
        differs = (blocks[..., :2] != blocks[:, :, :1, :2]).any(axis=(2, 3))
        if differs.any():
            row, group = first_true(differs)
            raise GGUFError(
                f"{gguf.path}: {name}, row {row}, group {group} has different scales, but the group size is {group_size}"
            )
