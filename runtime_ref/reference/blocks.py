"""Values rounded in blocks of 32: Q8_0 and Q4_0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference.functions import quantize
from runtime_ref.reference.integers import integer_matmul, scaled_row
from runtime_ref.weights import Matrix, Reader
from tmexport.types import GGMLType, decode_codes

BLOCK = 32


@dataclass(frozen=True)
class BlockMatrix(Matrix):
    """Codes int8 [n, k], -128..127, or -8..7 if bits is 4; scales fp16 [n, k / 32]. The activations come in the same blocks."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int = 8

    def multiply(self, x: np.ndarray, activations: Activations) -> np.ndarray:
        return integer_matmul(self.codes, self.scales, *quantize(x, BLOCK, activations.levels))

    def row(self, token: int) -> np.ndarray:
        return scaled_row(self.codes[token], self.scales[token])

    def block(self, activations: Activations) -> int:
        return BLOCK


def _q8(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> BlockMatrix:
    return BlockMatrix(*decode_codes(blocks, kind, k, name), bits=8)


def _q4(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> BlockMatrix:
    return BlockMatrix(*decode_codes(blocks, kind, k, name), bits=4)


def activation_block(kind: GGMLType, group: int | None, activations: Activations) -> int:
    """`Matrix.block` of a tensor that was not read yet."""
    return BLOCK


CODES: dict[GGMLType, Reader] = {}
VALUES: dict[GGMLType, Reader] = {GGMLType.Q8_0: _q8, GGMLType.Q4_0: _q4}
