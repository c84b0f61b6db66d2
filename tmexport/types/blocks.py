"""Blocks of 32 with a scale each: Q8_0 (codes -128..127) and Q4_0 (-8..7, the scale may be negative); both round values.

Q4_0 holds ternary codes exactly too: the code + 8, one scale for all blocks of a group. Layouts and rounding: llama.cpp,
ggml-common.h and the reference quantisers in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tmexport.errors import GGUFError
from tmexport.types.base import Container, GGMLType, first_true


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _encode_q8_0(values: np.ndarray) -> np.ndarray:
    """d = max|x| / 127, q = round(x / d) with halves away from zero; the scale first."""
    x = values.reshape(values.shape[0], -1, 32)
    d = np.abs(x).max(axis=2, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded = whole + (magnitude - whole >= np.float32(0.5))  # exact: no sum that could round up to the next integer
    q = np.copysign(rounded, scaled).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=2)


def _encode_q4_0(values: np.ndarray) -> np.ndarray:
    """d = (the value of largest magnitude) / -8, q = trunc(x / d + 8.5) up to 15; element j with j + 16 in one byte."""
    x = values.reshape(values.shape[0], -1, 32)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=2)[:, :, None], axis=2)
    d = extreme / np.float32(-8)
    q = np.minimum(15, np.trunc(x * _inverse(d) + np.float32(8.5))).astype(np.uint8)
    packed = q[:, :, :16] | q[:, :, 16:] << 4
    return np.concatenate([d.astype(np.float16).view(np.uint8), packed], axis=2)


def _encode_small_codes(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Ternary or binary codes [n, blocks, 32] and their scales, as Q4_0."""
    q = (codes + 8).astype(np.uint8)
    packed = q[:, :, :16] | q[:, :, 16:] << 4
    return np.concatenate([np.ascontiguousarray(scales)[:, :, None].view(np.uint8), packed], axis=2)


def _scales(grid: np.ndarray, name: str) -> np.ndarray:
    scales = np.ascontiguousarray(grid[:, :, :2]).view("<f2")[:, :, 0]
    bad = ~np.isfinite(scales)
    if bad.any():
        row, block = first_true(bad)
        raise GGUFError(
            f"{name}: row {row}, block {block} has the scale {scales[row, block]}; expected a finite number"
        )
    return scales


def _decode_q8_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(grid[:, :, 2:]).view(np.int8), _scales(grid, name)


def _decode_q4_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    codes = np.concatenate([grid[:, :, 2:] & 15, grid[:, :, 2:] >> 4], axis=2).astype(np.int8) - np.int8(8)
    return codes, _scales(grid, name)


def _error(steps: int, share: float) -> Callable[[np.ndarray], np.ndarray]:
    """`share` of a step of each block of 32, max|w| / steps, and the scale's fp16 rounding."""

    def bound(values: np.ndarray) -> np.ndarray:
        magnitude = np.abs(values).reshape(values.shape[0], -1, 32).max(axis=2)
        return np.repeat(magnitude / steps * share + magnitude * 2.0**-11 + 2.0**-24 * steps, 32, axis=1)

    return bound


CONTAINERS = (
    Container(GGMLType.Q8_0, None, None, _decode_q8_0, _encode_q8_0, error=_error(127, 0.5)),
    # a whole step, because its 16 levels are not symmetric
    Container(
        GGMLType.Q4_0, 2, {"ternary": _encode_small_codes, "binary": _encode_small_codes}, _decode_q4_0, _encode_q4_0,
        error=_error(8, 1.0),
    ),
)  # fmt: skip
