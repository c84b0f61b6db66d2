"""Codes -1, 0, 1 with a scale a group; binary weights are such codes without zeros."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference.functions import quantize
from runtime_ref.reference.integers import integer_matmul, scaled_row
from runtime_ref.weights import Matrix, Reader
from tmexport.errors import GGUFError
from tmexport.types import GGMLType, decode_codes, joined_scales

# Activations a block in profile `fast`: as llama.cpp multiplies the container, in Q8_K (256) or Q8_0 (32).
FAST_BLOCKS = {GGMLType.TQ1_0: 256, GGMLType.TQ2_0: 256, GGMLType.Q2_0: 32, GGMLType.Q1_0: 32, GGMLType.Q4_0: 32}


@dataclass(frozen=True)
class TernaryMatrix(Matrix):
    """codes int8 [n, k] in {-1, 0, 1}; scales fp16 [n, k / group]; fast_block: of the container that it came from."""

    codes: np.ndarray
    scales: np.ndarray
    fast_block: int = 256

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def multiply(self, x: np.ndarray, activations: Activations) -> np.ndarray:
        """x in blocks of the group (exact) or of the container's partner (fast)."""
        return integer_matmul(self.codes, self.scales, *quantize(x, self.block(activations), activations.levels))

    def row(self, token: int) -> np.ndarray:
        return scaled_row(self.codes[token], self.scales[token])

    def block(self, activations: Activations) -> int:
        return activations.block(self.group, self.fast_block)


def read(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> TernaryMatrix:
    """The blocks of a tensor, the scales of its blocks joined to groups."""
    codes, scales = decode_codes(blocks, kind, k, name)
    assert group is not None
    joined, differs = joined_scales(scales, scales.shape[1] * group // k)
    if differs.any():
        raise GGUFError(f"{name}: scales differ inside a group of {group}; the recorded group size is wrong")
    return TernaryMatrix(codes, joined, FAST_BLOCKS[kind])


def activation_block(kind: GGMLType, group: int | None, activations: Activations) -> int:
    """`Matrix.block` of a tensor that was not read yet."""
    assert group is not None
    return activations.block(group, FAST_BLOCKS[kind])


CODES: dict[GGMLType, Reader] = dict.fromkeys(FAST_BLOCKS, read)
VALUES: dict[GGMLType, Reader] = {}
