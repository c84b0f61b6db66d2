"""Blocks of 32 with a scale each: the kinds int8 and int4, and their containers Q8_0 and Q4_0, which round values as well.

    int8   codes -127..127, scale = max|w| / 127
    int4   codes -8..7, scale = (the weight of largest magnitude) / -8, which keeps its sign: the whole range is used

A scale is rounded to fp16 before a code is chosen, so the code is the nearest one to what will be multiplied out. llama.cpp's
quantisers (`_encode_q8_0`, `_encode_q4_0`) choose codes by the scale before that rounding, with halves away from zero.
Q8_0 may hold a code of -128, which no kind here has. Q4_0 holds ternary and binary codes exactly too: the code + 8, one scale
for all blocks of a group. Layouts and rounding: llama.cpp, ggml-common.h and the reference quantisers in ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tmexport.types.base import Coded, Container, GGMLType, scales_at

BLOCK = 32


@dataclass(frozen=True)
class BlockTensor(Coded):
    """A matrix [n, k] in blocks: codes int8 [n, k], scales fp16 [n, k / 32], any finite number but -0."""

    group_sizes = (BLOCK,)
    allowed_scales = "a finite fp16 other than -0"

    def _bad_scales(self) -> np.ndarray:
        return ~np.isfinite(self.scales) | (self.scales.view(np.uint16) == 0x8000)


@dataclass(frozen=True)
class Int8Tensor(BlockTensor):
    """Codes of a byte."""

    kind = "int8"
    allowed = tuple(range(-127, 128))


@dataclass(frozen=True)
class Int4Tensor(BlockTensor):
    """Codes of half a byte."""

    kind = "int4"
    allowed = tuple(range(-8, 8))


def quantize_int8(weight: np.ndarray, group_size: int = BLOCK) -> Int8Tensor:
    """Round to nearest: scale = max|w| / 127 of the block as fp16, code = round(w / scale), halves to even, in -127..127.

    Args:
        weight: fp32 [n, k], k a multiple of 32.
        group_size: 32.
    """
    grouped = np.ascontiguousarray(weight, np.float32).reshape(len(weight), -1, group_size)
    scales = _half(np.abs(grouped).max(axis=2) / np.float32(127))
    return Int8Tensor(_nearest(grouped, scales, -127, 127), scales, group_size)


def quantize_int4(weight: np.ndarray, group_size: int = BLOCK) -> Int4Tensor:
    """Round to nearest: scale = extreme / -8 of the block as fp16, code = round(w / scale), halves to even, in -8..7.

    The extreme is the weight of largest magnitude; of +a and -a it is -a.

    Args:
        weight: fp32 [n, k], k a multiple of 32.
        group_size: 32.
    """
    grouped = np.ascontiguousarray(weight, np.float32).reshape(len(weight), -1, group_size)
    high, low = grouped.max(axis=2), grouped.min(axis=2)
    scales = _half(np.where(high > -low, high, low) / np.float32(-8))
    return Int4Tensor(_nearest(grouped, scales, -8, 7), scales, group_size)


def _half(scales: np.ndarray) -> np.ndarray:
    """fp16, clamped to the finite numbers; +0 for -0."""
    return np.clip(scales, -65504, 65504).astype(np.float16) + np.float16(0)


def _nearest(grouped: np.ndarray, scales: np.ndarray, low: int, high: int) -> np.ndarray:
    wide = scales.astype(np.float32)[:, :, None]
    ratio = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide != 0)
    return np.clip(np.rint(ratio), low, high).astype(np.int8).reshape(len(grouped), -1)


def pack_bytes(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [n, k] as uint8 [n, k]: a byte each, two's complement (the checkpoint's form)."""
    return np.ascontiguousarray(codes).view(np.uint8)


def unpack_bytes(packed: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `pack_bytes`."""
    return np.ascontiguousarray(packed).view(np.int8)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [n, k] as uint8 [n, k / 2]: two a byte, lowest bits first, code + 8 (the checkpoint's form)."""
    fields = (codes + 8).astype(np.uint8)
    return fields[:, ::2] | fields[:, 1::2] << 4


def unpack_nibbles(packed: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `pack_nibbles`; every byte is allowed."""
    codes = np.empty((*packed.shape, 2), np.int8)
    codes[:, :, 0], codes[:, :, 1] = packed & 15, packed >> 4
    return codes.reshape(len(packed), -1) - np.int8(8)


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


def _encode_bytes(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8 codes [n, blocks, 32] and their scales, as Q8_0."""
    raw = np.ascontiguousarray(codes).view(np.uint8)
    return np.concatenate([np.ascontiguousarray(scales)[:, :, None].view(np.uint8), raw], axis=2)


def _encode_nibbles(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int4, ternary or binary codes [n, blocks, 32] and their scales, as Q4_0."""
    q = (codes + 8).astype(np.uint8)
    packed = q[:, :, :16] | q[:, :, 16:] << 4
    return np.concatenate([np.ascontiguousarray(scales)[:, :, None].view(np.uint8), packed], axis=2)


def _scales(grid: np.ndarray, name: str) -> np.ndarray:
    return scales_at(grid, 0, name, lambda scales: ~np.isfinite(scales), "a finite number")


def _decode_q8_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(grid[:, :, 2:]).view(np.int8), _scales(grid, name)


def _decode_q4_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    codes = np.concatenate([grid[:, :, 2:] & 15, grid[:, :, 2:] >> 4], axis=2).astype(np.int8) - np.int8(8)
    return codes, _scales(grid, name)


def _decode_q4_1(raw: np.ndarray) -> np.ndarray:
    """Read only: a scale and a minimum, both fp16, then 16 bytes as in Q4_0; value = q * scale + minimum, in fp32."""
    grid = raw.reshape(len(raw), -1, 20)
    ends = np.ascontiguousarray(grid[:, :, :4]).view("<f2").astype(np.float32)
    q = np.concatenate([grid[:, :, 4:] & 15, grid[:, :, 4:] >> 4], axis=2).astype(np.float32)
    return (q * ends[:, :, :1] + ends[:, :, 1:]).reshape(len(raw), -1)


def _error(steps: int, share: float) -> Callable[[np.ndarray], np.ndarray]:
    """`share` of a step of each block of 32, max|w| / steps, and the scale's fp16 rounding."""

    def bound(values: np.ndarray) -> np.ndarray:
        magnitude = np.abs(values).reshape(values.shape[0], -1, 32).max(axis=2)
        return np.repeat(magnitude / steps * share + magnitude * 2.0**-11 + 2.0**-24 * steps, 32, axis=1)

    return bound


CONTAINERS = (
    Container(GGMLType.Q8_0, 7, {"int8": _encode_bytes}, _decode_q8_0, _encode_q8_0, error=_error(127, 0.5)),
    Container(GGMLType.Q4_1, decode_values=_decode_q4_1),
    # a whole step, because its 16 levels are not symmetric
    Container(
        GGMLType.Q4_0, 2, dict.fromkeys(("ternary", "binary", "int4"), _encode_nibbles), _decode_q4_0, _encode_q4_0,
        error=_error(8, 1.0),
    ),
)  # fmt: skip
