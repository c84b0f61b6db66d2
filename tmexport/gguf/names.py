"""What a Mamba-2 model is called in GGUF: keys and tensors (llama.cpp, gguf-py constants and src/models/mamba2.cpp)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tmexport.checkpoint import EMBEDDING, FINAL_NORM, LM_HEAD, expected_shapes
from tmexport.config import Mamba2Config
from tmexport.errors import ConfigError, GGUFError
from tmexport.gguf.decode import decode_ternary
from tmexport.gguf.reader import GGUFFile
from tmexport.gguf.types import GGMLType
from tmexport.ternary import GROUP_SIZES, first_true

CONTEXT_LENGTH = 2**20  # a recurrent model has no limit; llama.cpp's converter writes this
GROUP_SIZE_KEY = "tmexport.group_size"
TOKENIZER_JSON_KEY = "tokenizer.huggingface.json"

_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_MATRICES = ("ssm_in.weight", "ssm_out.weight", "token_embd.weight", "output.weight")
_GLOBAL = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", LM_HEAD: "output.weight"}


def gguf_name(name: str) -> str:
    """The GGUF name of a tensor with this Hugging Face name."""
    if name in _GLOBAL:
        return _GLOBAL[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest]}"


def gguf_shape(name: str, config: Mamba2Config, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The numpy-order shape llama.cpp expects where it differs from the checkpoint's."""
    if name.endswith("conv1d.weight"):
        return (config.conv_dim, config.d_conv)
    if name.endswith((".A_log", ".D")):
        return (config.n_heads, 1)
    if name.endswith("mixer.norm.weight"):
        return (config.n_groups, config.d_inner // config.n_groups)
    return shape


def gguf_values(name: str, values: np.ndarray) -> np.ndarray:
    """The values llama.cpp expects: A = -exp(A_log), everything else as it is.

    The exponential is taken in fp64 and rounded once, so the bytes do not depend on the machine's fp32 exp.
    """
    if name.endswith(".A_log"):
        return (-np.exp(values.astype(np.float64))).astype(np.float32)
    return values


def model_metadata(config: Mamba2Config, file_type: int, name: str, group_size: int | None) -> dict[str, Any]:
    """The keys llama.cpp's loader needs, and ours."""
    metadata: dict[str, Any] = {
        "general.architecture": "mamba2",
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        "mamba2.context_length": CONTEXT_LENGTH,
        "mamba2.embedding_length": config.d_model,
        "mamba2.feed_forward_length": 0,
        "mamba2.attention.head_count": 0,
        "mamba2.block_count": config.n_layer,
        "mamba2.vocab_size": config.vocab_size,
        "mamba2.attention.layer_norm_rms_epsilon": config.rms_eps,
        "mamba2.ssm.conv_kernel": config.d_conv,
        "mamba2.ssm.inner_size": config.d_inner,
        "mamba2.ssm.state_size": config.d_state,
        "mamba2.ssm.time_step_rank": config.n_heads,
        "mamba2.ssm.group_count": config.n_groups,
    }
    if group_size is not None:
        metadata[GROUP_SIZE_KEY] = group_size
    return metadata


def config_from_metadata(gguf: GGUFFile) -> Mamba2Config:
    """The dimensions of a Mamba-2 GGUF, checked against its tensors.

    Raises:
        GGUFError: the file is of another architecture, or keys or tensors are missing or contradict each other.
    """
    meta = gguf.metadata
    architecture = meta.get("general.architecture")
    if architecture != "mamba2":
        raise GGUFError(f"{gguf.path}: general.architecture is {architecture!r}; expected 'mamba2'")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise GGUFError(f"{gguf.path}: has no matrix token_embd.weight; it is not a complete Mamba-2 model")
    d_model, d_inner = _whole(gguf, "embedding_length"), _whole(gguf, "ssm.inner_size")
    n_heads = _whole(gguf, "ssm.time_step_rank")
    if d_inner % d_model or d_inner % n_heads:
        raise GGUFError(
            f"{gguf.path}: inner size {d_inner} does not fit embedding length {d_model} and {n_heads} heads"
        )
    rows = meta.get("mamba2.vocab_size", embedding.shape[0])
    if rows != embedding.shape[0]:
        raise GGUFError(
            f"{gguf.path}: mamba2.vocab_size is {rows!r}, but token_embd.weight has {embedding.shape[0]} rows; expected them to agree"
        )
    epsilon = meta.get("mamba2.attention.layer_norm_rms_epsilon")
    try:
        config = Mamba2Config(
            d_model=d_model,
            n_layer=_whole(gguf, "block_count"),
            vocab_size=embedding.shape[0],
            d_state=_whole(gguf, "ssm.state_size"),
            d_conv=_whole(gguf, "ssm.conv_kernel"),
            expand=d_inner // d_model,
            headdim=d_inner // n_heads,
            n_groups=_whole(gguf, "ssm.group_count"),
            # stored as fp32: the nearest short decimal is the number that was meant (1e-5, not 9.99999974e-06)
            rms_eps=float(f"{epsilon:.7g}") if isinstance(epsilon, float) else epsilon,
            tie_embeddings="output.weight" not in gguf.tensors,
            bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=meta.get("tokenizer.ggml.eos_token_id"),
        )
    except ConfigError as error:
        raise GGUFError(f"{gguf.path}: {error}") from None
    _check_tensors(gguf, config)
    return config


def _whole(gguf: GGUFFile, key: str) -> int:
    value = gguf.metadata.get(f"mamba2.{key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GGUFError(f"{gguf.path}: mamba2.{key} is {value!r}; expected a positive whole number")
    return value


def tensor_shapes(config: Mamba2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GGUF of these dimensions, numpy order."""
    return {gguf_name(name): gguf_shape(name, config, shape) for name, shape in expected_shapes(config).items()}


def _check_tensors(gguf: GGUFFile, config: Mamba2Config) -> None:
    expected: Mapping[str, tuple[int, ...]] = tensor_shapes(config)
    for name, shape in expected.items():
        info = gguf.tensors.get(name)
        if info is None:
            raise GGUFError(f"{gguf.path}: has no tensor {name}; expected shape {list(shape)}")
        if info.shape != shape:
            raise GGUFError(f"{gguf.path}: {name} has the shape {list(info.shape)}; expected {list(shape)}")
        if info.type.is_ternary and not name.endswith(("ssm_in.weight", "ssm_out.weight")):
            raise GGUFError(f"{gguf.path}: {name} is {info.type.name}; only ssm_in and ssm_out may be ternary")
        if not name.endswith(_MATRICES) and info.type not in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
            raise GGUFError(f"{gguf.path}: {name} is {info.type.name}; expected F32")
    extra = set(gguf.tensors) - set(expected)
    if extra:
        raise GGUFError(f"{gguf.path}: holds {min(extra)}, which a Mamba-2 of these dimensions does not have")


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
