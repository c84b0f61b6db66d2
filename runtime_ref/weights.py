"""The weights of a model as plain arrays, from a GGUF file or from memory; the form the specification reads.

`runtime_ref.kernels.packed` turns the same matrices into the kernels' layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime_ref.arithmetic import Activations, Preset
from tmexport.model import Model
from tmexport.model.spec import Branch, TensorSpec
from tmexport.types import GGMLType

if TYPE_CHECKING:
    from runtime_ref.kernels.packed import Packed


class Matrix(ABC):
    """A weight matrix [n, k] as the specification multiplies it: a file a kind in `runtime_ref.reference`."""

    @abstractmethod
    def multiply(self, x: np.ndarray, activations: Activations) -> np.ndarray:
        """y fp32 [n] = the matrix times x fp32 [k]."""

    @abstractmethod
    def row(self, token: int) -> np.ndarray:
        """One row in fp32 [k]."""

    @abstractmethod
    def block(self, activations: Activations) -> int:
        """How many activations share a scale when multiplied with this matrix."""


# blocks uint8 [n, bytes of a row] of a tensor [n, k], its type, k, the group size of codes (None for values), its name for
# messages -> the matrix. Raises GGUFError for damaged blocks, or scales that differ inside a group.
Reader = Callable[[np.ndarray, GGMLType, int, int | None, str], Matrix]


@dataclass(frozen=True)
class BranchWeights:
    """One branch of one block: its matrices and its vectors by role; a convolution's taps come first: [K, C]."""

    branch: Branch
    matrices: Mapping[str, Matrix]
    vectors: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class BlockWeights:
    """norm fp32 [d], and the branches that read it."""

    norm: np.ndarray
    branches: tuple[BranchWeights, ...]


@dataclass(frozen=True)
class Weights:
    """A whole model: embedding [V, d] and head [V, d] (the same object when tied), norm_f fp32 [d]."""

    config: Model
    embedding: Matrix
    head: Matrix
    blocks: tuple[BlockWeights, ...]
    norm_f: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where tensors come from, read one at a time: `matrix(name)` and `vector(name)` take GGUF names.

    Attributes:
        config: the dimensions.
        matrix: a weight matrix by name.
        packed: the same in the kernels' layout (`kernels.packed`).
        activation_block: how many activations share a scale when multiplied with a matrix, by name, in a preset.
        vector: any small tensor by name, fp32, in numpy's (rows first) shape.
        tied: there is no separate head.
    """

    config: Model
    matrix: Callable[[str], Matrix]
    packed: Callable[[str], Packed]
    activation_block: Callable[[str, Preset], int]
    vector: Callable[[str], np.ndarray]
    tied: bool


def block_norm(source: Source, number: int) -> np.ndarray:
    """The weight of a block's norm, fp32 [d]."""
    names = source.config.names
    name = names.block[1].format(number // len(names.norms)) + names.norms[number % len(names.norms)]
    return np.array(source.vector(name).reshape(source.config.d_model), np.float32)


def tensor_name(config: Model, number: int, spec: TensorSpec) -> str:
    """What a GGUF calls a tensor of a branch of this block."""
    return config.names.block[1].format(number // len(config.names.norms)) + spec.gguf


def final_norm(source: Source) -> np.ndarray:
    """The weight of the norm before the head, fp32 [d]."""
    return np.array(source.vector("output_norm.weight").reshape(source.config.d_model), np.float32)


def vectors(source: Source, number: int, branch: Branch) -> dict[str, np.ndarray]:
    """The small tensors of a branch by role, fp32, in the shape of a checkpoint; a convolution's weight is [K, C]."""
    found = {}
    for spec in branch.tensors():
        if not spec.low_bit and not spec.matrix:
            values = source.vector(tensor_name(source.config, number, spec)).reshape(spec.shape)
            values = values[:, 0].T if spec.role == "conv_weight" else values
            found[spec.role] = np.array(values, np.float32, order="C")
    return found


def load_weights(source: Source) -> Weights:
    """The whole model in plain form (int8 codes: four times the packed size; for the specification and for tests)."""
    embedding = source.matrix("token_embd.weight")
    return Weights(
        config=source.config,
        embedding=embedding,
        head=embedding if source.tied else source.matrix("output.weight"),
        blocks=tuple(
            BlockWeights(block_norm(source, number), tuple(_branch(source, number, b) for b in block.branches))
            for number, block in enumerate(source.config.blocks)
        ),
        norm_f=final_norm(source),
    )


def _branch(source: Source, number: int, branch: Branch) -> BranchWeights:
    names = {s.role: tensor_name(source.config, number, s) for s in branch.tensors() if s.low_bit or s.matrix}
    matrices = {role: source.matrix(name) for role, name in names.items()}
    return BranchWeights(branch, matrices, vectors(source, number, branch))


def memory_source(config: Model, tensors: dict[str, np.ndarray | Matrix]) -> Source:
    """A model held in memory, tensors under their GGUF names (for tests and experiments)."""
    from runtime_ref.kernels.kinds import pack

    return Source(
        config,
        matrix=tensors.__getitem__,  # type: ignore[arg-type]
        packed=lambda name: pack(tensors[name]),  # type: ignore[arg-type]
        activation_block=lambda name, preset: tensors[name].block(preset.activations),  # type: ignore[union-attr]
        vector=tensors.__getitem__,  # type: ignore[arg-type]
        tied="output.weight" not in tensors,
    )
