"""A GGUF file as a `Source`: matrices decoded to plain arrays, one at a time."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.reference.model import BRANCHES
from runtime_ref.reference.products import activation_block as block_of
from runtime_ref.reference.products import read_blocks
from runtime_ref.weights import Matrix, Source
from tmexport.errors import GGUFError
from tmexport.gguf.names import config_from_metadata, group_sizes_of, in_halves
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.model import Model
from tmexport.types import decode_values

if TYPE_CHECKING:
    from runtime_ref.kernels.packed import Packed


def gguf_source(path: Path | str) -> Source:
    """Open a GGUF.

    Raises:
        GGUFError: the file is damaged, or has layers or types that this runtime does not compute.
    """
    gguf = open_gguf(path)
    return source_of(gguf)


def source_of(gguf: GGUFFile) -> Source:
    """A validated file as a source."""
    config = config_from_metadata(gguf)
    check_branches(config, gguf.path)
    groups = group_sizes_of(gguf)
    rotated = {tensor.gguf: tensor.rotated for tensor in config.tensors.values() if tensor.rotated is not None}
    if rotated:
        gguf = _InHalves(gguf.path, gguf.metadata, gguf.tensors, gguf.data, rotated)

    def matrix(name: str) -> Matrix:
        return read_matrix(gguf, name, groups.get(name))

    def vector(name: str) -> np.ndarray:
        info = gguf.tensors[name]
        values = decode_values(gguf.blocks(name), info.type, info.shape[-1], name)
        result = values.reshape(info.shape).copy()
        _forget(gguf, name)
        return result

    def packed(name: str) -> Packed:
        from runtime_ref.kernels.kinds import read_packed

        result = read_packed(gguf, name, groups.get(name))
        _forget(gguf, name)
        return result

    def activation_block(name: str, preset: Preset) -> int:
        return block_of(gguf.tensors[name].type, groups.get(name), preset.activations, name)

    return Source(config, matrix, packed, activation_block, vector, "output.weight" not in gguf.tensors)


@dataclass(frozen=True)
class _InHalves(GGUFFile):
    """A file whose rows that RoPE turns are given as this program and transformers have them: half after half of each head."""

    rotated: Mapping[str, int] = field(default_factory=dict)

    def blocks(self, name: str) -> np.ndarray:
        found = super().blocks(name)
        if name not in self.rotated:
            return found
        rows = self.tensors[name].shape[0]
        return in_halves(found.reshape(rows, -1), self.rotated[name]).reshape(found.shape)


def check_branches(model: Model, where: object) -> None:
    """Raises GGUFError if a block has a branch that this runtime has no specification and no kernels for."""
    for block in model.blocks:
        for branch in block.branches:
            if branch.kind not in BRANCHES:
                raise GGUFError(
                    f"{where}: has {branch.kind} layers, which this runtime does not compute; run it with llama.cpp"
                )


def _forget(gguf: GGUFFile, name: str) -> None:
    """Let the system take back the mapped pages of a tensor that has been read, and its neighbours' on them, which come back when they are read.

    Linux may map 2 MB where one byte is read: then a layer's small vectors keep its matrices.
    """
    mapped = getattr(gguf.data, "_mmap", None)
    if mapped is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    info = gguf.tensors[name]
    start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)


def read_matrix(gguf: GGUFFile, name: str, group: int | None) -> Matrix:
    """One weight matrix as plain arrays.

    Args:
        gguf: the file.
        name: of the tensor.
        group: the group size of a tensor that holds codes, to which its blocks' scales are joined; None for values.

    Raises:
        GGUFError: damaged blocks, or scales that differ inside a group.
    """
    info = gguf.tensors[name]
    return read_blocks(gguf.blocks(name), info.type, info.shape[-1], group, name)
