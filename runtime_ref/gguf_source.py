"""A GGUF file as a `Source`: matrices decoded to plain arrays, one at a time."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.weights import BlockMatrix, DenseMatrix, Matrix, Source, TernaryMatrix
from tmexport.errors import GGUFError
from tmexport.gguf.decode import decode_ternary, dequantize
from tmexport.gguf.names import config_from_metadata, group_size_of
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.gguf.types import GGMLType

if TYPE_CHECKING:
    from runtime_ref.kernels.pack import Packed


def gguf_source(path: Path | str) -> Source:
    """Open a Mamba-2 GGUF.

    Raises:
        GGUFError: the file is damaged, or not a Mamba-2 of a type this runtime computes.
    """
    gguf = open_gguf(path)
    return source_of(gguf)


def source_of(gguf: GGUFFile) -> Source:
    """A validated file as a source."""
    config = config_from_metadata(gguf)
    group = group_size_of(gguf)

    def matrix(name: str) -> Matrix:
        return read_matrix(gguf, name, group)

    def vector(name: str) -> np.ndarray:
        info = gguf.tensors[name]
        values = dequantize(gguf.blocks(name), info.type, info.shape[-1], name)
        return values.reshape(info.shape)

    def packed(name: str) -> Packed:
        from runtime_ref.kernels.repack import read_packed

        result = read_packed(gguf, name, group)
        _forget(gguf, name)
        return result

    def activation_block(name: str, preset: Preset) -> int:
        kind = gguf.tensors[name].type
        if not kind.is_ternary:
            return 32
        assert group is not None
        return preset.activations.block(group, fast_block(kind))

    return Source(config, matrix, packed, activation_block, vector, "output.weight" not in gguf.tensors)


def _forget(gguf: GGUFFile, name: str) -> None:
    """Let the system take back the mapped pages of a tensor that has been read."""
    mapped = getattr(gguf.data, "_mmap", None)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    info = gguf.tensors[name]
    start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (info.offset + info.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, start, length)


def read_matrix(gguf: GGUFFile, name: str, group: int | None) -> Matrix:
    """One weight matrix as plain arrays.

    Args:
        gguf: the file.
        name: of the tensor.
        group: the file's group size; a ternary tensor's scales are joined to it.

    Raises:
        GGUFError: damaged blocks, or scales that differ inside a group.
    """
    info = gguf.tensors[name]
    blocks, k = gguf.blocks(name), info.shape[-1]
    if info.type.is_ternary:
        assert group is not None
        codes, scales = decode_ternary(blocks, info.type, k, name)
        return TernaryMatrix(codes, join_scales(scales, k, group, name), fast_block(info.type))
    if info.type in (GGMLType.Q8_0, GGMLType.Q4_0):
        grid = blocks.reshape(len(blocks), k // 32, info.type.block_bytes)
        scales = np.ascontiguousarray(grid[:, :, :2]).view(np.float16)[:, :, 0]
        if info.type is GGMLType.Q8_0:
            return BlockMatrix(np.ascontiguousarray(grid[:, :, 2:]).view(np.int8).reshape(len(blocks), k), scales)
        nibbles = np.concatenate([grid[:, :, 2:] & 15, grid[:, :, 2:] >> 4], axis=2).astype(np.int8) - np.int8(8)
        return BlockMatrix(nibbles.reshape(len(blocks), k), scales, bits=4)
    if info.type is GGMLType.F16:
        return DenseMatrix(np.ascontiguousarray(blocks).view(np.float16))
    return DenseMatrix(dequantize(blocks, info.type, k, name))


def fast_block(kind: GGMLType) -> int:
    """Activations a block in profile `fast`: llama.cpp's Q8_K for TQ1_0 and TQ2_0, Q8_0 for Q2_0."""
    return 32 if kind is GGMLType.Q2_0 else 256


def join_scales(scales: np.ndarray, k: int, group: int, name: str) -> np.ndarray:
    """Scales a block [n, blocks] as scales a group [n, k / group].

    Raises:
        GGUFError: the blocks of a group have different scales.
    """
    per_group = scales.shape[1] * group // k
    joined = scales[:, ::per_group]
    if (np.repeat(joined, per_group, axis=1) != scales).any():
        raise GGUFError(f"{name}: scales differ inside a group of {group}; the recorded group size is wrong")
    return np.ascontiguousarray(joined)
