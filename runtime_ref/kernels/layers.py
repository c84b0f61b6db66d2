"""What a branch's kernels are built from: the tensors of one layer in the kernels' layout, and the steps that use them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.kernels.isa import Isa
from runtime_ref.kernels.kinds import UNQUANTISED
from runtime_ref.kernels.packed import Packed, aligned, expect
from runtime_ref.kernels.phases import (
    ADD,
    RESIDUAL,
    SUM,
    Added,
    Norm,
    Product,
    Rows,
    add_rows,
    norm_rows,
    quantize_rows,
    ways,
)
from runtime_ref.kernels.program import Step
from runtime_ref.state import branch_state_arrays
from runtime_ref.weights import Source, block_norm, tensor_name, vectors
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
        copy = self.room(array.shape, array.dtype)
        copy[...] = array
        return copy

    def room(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in here, its contents undefined."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        size = -(-n_bytes // 64) * 64
        with self._lock:
            if len(self._free) < size:
                self._free = aligned((max(self.SIZE, size),), np.dtype(np.uint8))
            room, self._free = self._free[:size], self._free[size:]
        return room[:n_bytes].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Layer:
    """One branch of one block.

    number: the block's; place: of the branch in it; slot: of the branch's first state among the state's arrays; index: among the branches that share
    those arrays; eps: the norms'.
    """

    source: Source
    preset: Preset
    isa: Isa
    arena: Arena
    number: int
    branch: Any
    place: int
    slot: int
    index: int
    eps: float

    @property
    def slots(self) -> range:
        """The numbers of the branch's arrays among the state's."""
        return range(self.slot, self.slot + len(branch_state_arrays(self.branch, self.preset)))

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
        found = multiplied(self.source, tensor_name(self.source.config, self.number, spec), n, k, self.preset)
        return found._replace(packed=type(found.packed)(*map(self.arena.keep, found.packed)))

    def product(self, matrix: Multiplied, target: int) -> Step:
        """The matrix times what is prepared in the scratch."""
        few, many = ways(self.isa, self.preset.activations)
        return Step(few, Product(*matrix, target), many)

    def normed_product(self, role: str, target: int) -> list[Step]:
        """The block's norm, and the product that reads it."""
        return self.normed_products({role: target})

    def normed_products(self, targets: Mapping[str, int]) -> list[Step]:
        """The block's norm, and the products that read it: roles, and where their results go."""
        matrices = {role: self.matrix(role) for role in targets}
        ready = next((matrix.block for matrix in matrices.values() if matrix.block), 0)
        norm = Norm(block_norm(self.source, self.number), self.eps, ready, self.number)
        found = [Step(norm_rows(self.preset.activations), norm)]
        for role, matrix in matrices.items():
            if matrix.block not in (0, ready):  # its scales reach over other activations
                ready, found[-1] = matrix.block, replace(found[-1], apart=False)
                found.append(Step(quantize_rows(self.preset.activations), Rows(matrix.k, ready)))
            found.append(replace(self.product(matrix, targets[role]), apart=True))
        return [*found[:-1], replace(found[-1], apart=False)]

    def output(self, matrix: Multiplied, bias: np.ndarray | None = None) -> list[Step]:
        """The last product of the branch, and what its block then adds to the residual stream."""
        block = self.source.config.blocks[self.number]
        if len(block.branches) == 1 and bias is None and block.multiplier == 1.0:
            return [self.product(matrix, RESIDUAL)]
        assert bias is None or len(block.branches) == 1, "a bias is added after the block's sum"
        found = [self.product(matrix, ADD if self.place else SUM)]
        if self.place == len(block.branches) - 1:
            bias = np.zeros(0, np.float32) if bias is None else bias
            found.append(Step(add_rows, Added(bias, float(np.float32(block.multiplier)), self.source.config.d_model)))
        return found


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
