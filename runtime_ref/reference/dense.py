"""Values as they are, fp16 or fp32; the activations are not rounded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.reference.functions import sum16
from runtime_ref.weights import Matrix, Reader
from tmexport.types import GGMLType, decode_values

UNROUNDED = 32  # stands where a block's size is asked for; no kernel rounds what a dense matrix reads


@dataclass(frozen=True)
class DenseMatrix(Matrix):
    """values fp32 or fp16 [n, k]."""

    values: np.ndarray

    def multiply(self, x: np.ndarray, activations: Activations) -> np.ndarray:
        return sum16(self.values.astype(np.float32) * x)

    def row(self, token: int) -> np.ndarray:
        return self.values[token].astype(np.float32)

    def block(self, activations: Activations) -> int:
        return UNROUNDED


def read(blocks: np.ndarray, kind: GGMLType, k: int, group: int | None, name: str) -> DenseMatrix:
    """A tensor's values: fp16 as it lies, other types in fp32."""
    if kind is GGMLType.F16:
        return DenseMatrix(np.ascontiguousarray(blocks).view(np.float16))
    return DenseMatrix(decode_values(blocks, kind, k, name))


def activation_block(kind: GGMLType, group: int | None, activations: Activations) -> int:
    """`Matrix.block` of a tensor that was not read yet."""
    return UNROUNDED


CODES: dict[GGMLType, Reader] = {}
# Q4_1 is read, not made to be run: export it as int4 or int8.
VALUES: dict[GGMLType, Reader] = dict.fromkeys((GGMLType.F16, GGMLType.F32, GGMLType.BF16, GGMLType.Q4_1), read)
