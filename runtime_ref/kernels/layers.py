"""What a branch's kernels are built from: the tensors of one layer in the kernels' layout, and the steps that use them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.kernels.isa import Isa
from runtime_ref.kernels.matmul import UNQUANTISED
from runtime_ref.kernels.pack import Packed, aligned, expect
from runtime_ref.kernels.phases import Norm, Product, norm_rows, ways
from runtime_ref.kernels.program import Step
from runtime_ref.weights import Source, block_norm, vectors
from tmexport.errors import GGUFError


class Multiplied(NamedTuple):
    """A matrix [n, k], and how many activations share a scale when it is multiplied (0: they are not quantised)."""

    packed: Packed
    k: int
    block: int


class Arena:
    """Memory for many matrices side by side, each on a cache line: a layer's own arrays would be spread over small pages."""

    SIZE = 64 << 20

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)
        self._lock = Lock()

    def keep(self, array: np.ndarray) -> np.ndarray:
        """A copy of the array in here."""
        size = -(-array.nbytes // 64) * 64
        with self._lock:
            if len(self._free) < size:
                self._free = aligned((max(self.SIZE, size),), np.dtype(np.uint8))
            room, self._free = self._free[:size], self._free[size:]
        copy = room[: array.nbytes].view(array.dtype).reshape(array.shape)
        copy[...] = array
        return copy


@dataclass(frozen=True)
class Layer:
    """One branch of one block.

    number: the block's; slot: of the branch's first state among the state's arrays; index: among the branches that share
    those arrays; eps: the norms'.
    """

    source: Source
    preset: Preset
    isa: Isa
    arena: Arena
    number: int
    branch: Any
    slot: int
    index: int
    eps: float

    @cached_property
    def small(self) -> dict[str, np.ndarray]:
        """The vectors by role (`weights.vectors`)."""
        return vectors(self.source, self.number, self.branch)

    def matrix(self, role: str) -> Multiplied:
        """A matrix by its role.

        Raises:
            GGUFError: it is damaged, or of a type or shape that the kernels do not compute.
        """
        (spec,) = (spec for spec in self.branch.tensors() if spec.role == role)
        n, k = spec.gguf_shape or spec.shape
        found = multiplied(self.source, f"blk.{self.number}.{spec.gguf}", n, k, self.preset)
        return found._replace(packed=type(found.packed)(*map(self.arena.keep, found.packed)))

    def product(self, matrix: Multiplied, target: int) -> Step:
        """The matrix times what is prepared in the scratch."""
        few, many = ways(self.isa, self.preset.activations)
        return Step(few, Product(*matrix, target), many)

    def normed_product(self, role: str, target: int) -> list[Step]:
        """The block's norm, and the product that reads it."""
        matrix = self.matrix(role)
        norm = Norm(block_norm(self.source, self.number), self.eps, matrix.block, self.number)
        return [Step(norm_rows(self.preset.activations), norm), self.product(matrix, target)]


def multiplied(source: Source, name: str, n: int, k: int, preset: Preset) -> Multiplied:
    """A matrix of the file that is multiplied with activations.

    Raises:
        GGUFError: it is damaged, or of a type or shape that the kernels do not compute.
    """
    packed, block = source.packed(name), source.activation_block(name, preset)
    try:
        expect(packed, n, k, block, name)
    except ValueError as error:
        raise GGUFError(str(error)) from None
    return Multiplied(packed, k, 0 if isinstance(packed, UNQUANTISED) else block)


def sixteens(what: str, size: int) -> None:
    """Raises GGUFError unless the kernels' vectors of 16 divide it."""
    if size % 16:
        raise GGUFError(f"{what} is {size}; this runtime needs a multiple of 16")
