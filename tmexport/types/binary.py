"""Binary: codes -1 and +1 and one fp16 scale a group of 128 along the row (Bi-Mamba's 1 bit); its container Q1_0.

The scale is mean|w| of the group, as in XNOR-Net (arXiv 1603.05279), here along the row, so that stock llama.cpp holds it.
Q1_0: the scale, then 16 bytes, element i in bit i % 8 of byte i // 8, 1 for +1 (llama.cpp, ggml-common.h, block_q1_0).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tmexport.errors import NotTernaryError
from tmexport.types.base import Coded, Container, GGMLType, bad_scales, first_true, mean_scales, scales_at

GROUP_SIZES = (128,)


@dataclass(frozen=True)
class BinaryTensor(Coded):
    """A binary matrix [n, k]: codes int8 [n, k], scales fp16 [n, k / 128]."""

    kind = "binary"
    allowed = (-1, 1)
    group_sizes = GROUP_SIZES


def quantize_sign(weight: np.ndarray, group_size: int = 128) -> BinaryTensor:
    """Round to nearest: scale = mean|w| of the group as fp16, code = the sign of w, +1 for 0.

    Args:
        weight: fp32 [n, k], k a multiple of group_size.
        group_size: weights that share a scale.
    """
    return BinaryTensor(np.where(weight < 0, -1, 1).astype(np.int8), mean_scales(weight, group_size), group_size)


def exact_binary(weight: np.ndarray, name: str, group_size: int = 128) -> BinaryTensor:
    """Read a dense matrix whose every group is {-s, +s} with s a positive normal fp16, without changing one value.

    Raises:
        NotTernaryError: naming the first row and group that is not of that form.
    """
    n, k = weight.shape
    if k % group_size:
        raise NotTernaryError(f"{name}: rows of {k} weights do not divide into groups of {group_size}")
    magnitude = np.abs(weight.astype(np.float32)).reshape(n, -1, group_size)
    with np.errstate(over="ignore"):
        scales = magnitude[:, :, 0].astype(np.float16)
    ok = (magnitude == scales.astype(np.float32)[:, :, None]).all(axis=2) & ~bad_scales(scales) & (scales > 0)
    if not ok.all():
        row, group = first_true(~ok)
        raise NotTernaryError(
            f"{name}: row {row}, group {group} (of {group_size}) is not binary; expected one |w|, an fp16"
        )
    return BinaryTensor(np.where(np.signbit(weight), -1, 1).astype(np.int8), scales, group_size)


def pack_signs(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [n, k] as uint8 [n, k / 8]: bit i % 8 of byte i // 8 is 1 for +1 (the checkpoint's form)."""
    return np.packbits(codes > 0, axis=1, bitorder="little")


def unpack_signs(packed: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `pack_signs`; every byte is allowed."""
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.int8) * np.int8(2) - np.int8(1)


def _encode_q1_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    signs = np.packbits(codes > 0, axis=2, bitorder="little")
    return np.concatenate([np.ascontiguousarray(scales)[:, :, None].view(np.uint8), signs], axis=2)


def _decode_q1_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    scales, codes = scales_at(grid, 0, name), np.empty((*grid.shape[:2], 128), np.int8)
    for element in range(128):
        codes[:, :, element] = (grid[:, :, 2 + element // 8] >> (element % 8) & 1).astype(np.int8) * 2 - 1
    return codes, scales


CONTAINERS = (Container(GGMLType.Q1_0, 40, {"binary": _encode_q1_0}, _decode_q1_0),)
