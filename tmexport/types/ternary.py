"""Ternary: codes in {-1, 0, +1} and one fp16 scale a group of 64, 128 or 256; its containers TQ1_0, TQ2_0 and Q2_0.

W[n, k] = codes[n, k] * scales[n, k // group_size]. A scale is +0 (then every code of its group is 0) or a positive
*normal* fp16. Layouts: llama.cpp, ggml-common.h (block_tq1_0, block_tq2_0, block_q2_0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tmexport.errors import CheckpointError, GGUFError, NotTernaryError
from tmexport.types.base import Coded, Container, GGMLType, bad_scales, first_true, mean_scales, scales_at

GROUP_SIZES = (256, 128, 64)
_ROWS_AT_ONCE = 64  # keeps the intermediates in cache


@dataclass(frozen=True)
class TernaryTensor(Coded):
    """A ternary matrix [n, k]: codes int8 [n, k], scales fp16 [n, k / group_size]."""

    kind = "ternary"
    allowed = (-1, 0, 1)
    group_sizes = GROUP_SIZES


def quantize_absmean(weight: np.ndarray, group_size: int = 256) -> TernaryTensor:
    """Round to nearest: scale = mean|w| of the group as fp16, code = round(clip(w / scale, -1, 1)), halves to even.

    This loses information unless `weight` already is ternary with these scales; `exact_ternary` is the lossless reading.

    Args:
        weight: fp32 [n, k], k a multiple of group_size.
        group_size: weights that share a scale.
    """
    n, k = weight.shape
    grouped = np.ascontiguousarray(weight, np.float32).reshape(n, k // group_size, group_size)
    scales = mean_scales(weight, group_size)
    codes = np.rint(np.clip(grouped / scales.astype(np.float32)[:, :, None], -1.0, 1.0)).astype(np.int8)
    return TernaryTensor(codes.reshape(n, k), scales, group_size)


def exact_ternary(weight: np.ndarray, name: str, group_size: int) -> TernaryTensor:
    """Read a dense matrix whose every group already is {-s, 0, +s} with s an fp16, without changing one value.

    Args:
        weight: fp32 or fp16 [n, k].
        name: for the error.
        group_size: weights that share a scale.

    Raises:
        NotTernaryError: naming the first row and group that is not of that form.
    """
    n, k = weight.shape
    if k % group_size:
        raise NotTernaryError(f"{name}: rows of {k} weights do not divide into groups of {group_size}")
    kept = weight if weight.dtype == np.float16 else weight.astype(np.float32, copy=False)
    # With the sign bit off, the bits of a float order as its magnitude does: the test is on integers, rows at a time.
    unsigned: Any = np.uint16 if kept.dtype == np.float16 else np.uint32
    sign = np.dtype(unsigned).itemsize * 8 - 1
    codes, scales = np.empty((n, k), np.int8), np.empty((n, k // group_size), np.float16)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        bits = np.ascontiguousarray(kept[rows]).view(unsigned).reshape(-1, k // group_size, group_size)
        magnitude = bits & unsigned(2**sign - 1)
        largest = magnitude.max(axis=2)
        with np.errstate(over="ignore", invalid="ignore"):
            scales[rows] = largest.view(kept.dtype).astype(np.float16)
        ok = (scales[rows].astype(kept.dtype).view(unsigned) == largest) & ~bad_scales(scales[rows])
        ok &= ((magnitude == 0) | (magnitude == largest[:, :, None])).all(axis=2)
        if not ok.all():
            row, group = first_true(~ok)
            values = np.unique(magnitude[row, group]).view(kept.dtype)
            shown = ", ".join(f"{v:.6g}" for v in values[:3]) + (", ..." if len(values) > 3 else "")
            raise NotTernaryError(
                f"{name}: row {start + row}, group {group} (of {group_size}) is not ternary: |w| takes the values {shown}; "
                "expected 0 and one fp16 scale"
            )
        negative = (bits >> unsigned(sign)).astype(np.int8)
        codes[rows] = ((magnitude != 0) * (1 - 2 * negative)).reshape(-1, k)
    return TernaryTensor(codes, scales, group_size)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Codes int8 [n, k] as uint8 [n, k / 4]: 4 a byte, lowest bits first, code + 1 (the ternary checkpoint's form)."""
    two_bit = (codes + 1).astype(np.uint8).reshape(codes.shape[0], -1, 4)
    return two_bit[:, :, 0] | two_bit[:, :, 1] << 2 | two_bit[:, :, 2] << 4 | two_bit[:, :, 3] << 6


def unpack_codes(packed: np.ndarray, name: str) -> np.ndarray:
    """The inverse of `pack_codes`.

    Raises:
        CheckpointError: a 2-bit value is 3.
    """
    codes = np.empty((*packed.shape, 4), np.int8)
    for position in range(4):
        codes[:, :, position] = (packed >> (2 * position)) & 3
    codes -= 1
    if codes.max(initial=0) > 1:
        row, column = first_true(codes.reshape(packed.shape[0], -1) > 1)
        raise CheckpointError(f"{name}: row {row}, column {column} holds the 2-bit value 3; expected 0, 1 or 2")
    return codes.reshape(packed.shape[0], -1)


def _scale_bytes(scales: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(scales).view(np.uint8).reshape(*scales.shape, 2)


def _digits(codes: np.ndarray) -> np.ndarray:
    return (codes + 1).view(np.uint8)


def _encode_tq1_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Base 3, the first element most significant: 32 bytes of 5 elements, 16 of 5, 4 of 4, then the scale."""
    digits = _digits(codes)

    def base3(part: np.ndarray) -> np.ndarray:
        value = np.zeros((*part.shape[:2], part.shape[3]), np.uint16)
        for position in range(5):
            value *= 3
            if position < part.shape[2]:
                value += part[:, :, position]
        return ((value * 256 + 242) // 243).astype(np.uint8)  # a fixed-point fraction of 243, rounded up

    lead = digits.shape[:2]
    return np.concatenate(
        [
            base3(digits[:, :, :160].reshape(*lead, 5, 32)),
            base3(digits[:, :, 160:240].reshape(*lead, 5, 16)),
            base3(digits[:, :, 240:].reshape(*lead, 4, 4)),
            _scale_bytes(scales),
        ],
        axis=2,
    )


def _encode_tq2_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Each half block of 128: byte m holds the elements m, m + 32, m + 64, m + 96; then the scale."""
    digits = _digits(codes)
    lanes = digits.reshape(*digits.shape[:2], 2, 4, 32)
    packed = lanes[:, :, :, 0] | lanes[:, :, :, 1] << 2 | lanes[:, :, :, 2] << 4 | lanes[:, :, :, 3] << 6
    return np.concatenate([packed.reshape(*digits.shape[:2], 64), _scale_bytes(scales)], axis=2)


def _encode_q2_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The scale, then 4 consecutive elements a byte, lowest bits first."""
    digits = _digits(codes)
    quads = digits.reshape(*digits.shape[:2], 16, 4)
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return np.concatenate([_scale_bytes(scales), packed], axis=2)


def _checked_codes(codes: np.ndarray, name: str) -> np.ndarray:
    codes -= 1
    if codes.max(initial=0) > 1:
        row, block, _ = first_true(codes > 1)
        raise GGUFError(f"{name}: row {row}, block {block} holds the 2-bit code 3; expected 0, 1 or 2")
    return codes


def _decode_tq2_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    scales, codes = scales_at(grid, 64, name), np.empty((*grid.shape[:2], 256), np.int8)
    for element in range(256):
        half, within = divmod(element, 128)
        shift, byte = divmod(within, 32)
        codes[:, :, element] = (grid[:, :, 32 * half + byte] >> (2 * shift)) & 3
    return _checked_codes(codes, name), scales


def _decode_q2_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    scales, codes = scales_at(grid, 0, name), np.empty((*grid.shape[:2], 64), np.int8)
    for element in range(64):
        codes[:, :, element] = (grid[:, :, 2 + element // 4] >> (2 * (element % 4))) & 3
    return _checked_codes(codes, name), scales


def _decode_tq1_0(grid: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    scales, codes = scales_at(grid, 52, name), np.empty((*grid.shape[:2], 256), np.int8)
    _unpack_base3(grid, codes, name)
    return codes - np.int8(1), scales


def _base3_digits() -> tuple[np.ndarray, np.ndarray]:
    """For every byte: its five digits as ggml reads them, and whether an encoder writes that byte."""
    digits = np.zeros((256, 5), np.int8)
    for byte in range(256):
        for position in range(5):
            digits[byte, position] = ((byte * 3**position) % 256) * 3 // 256
    value = digits.astype(np.int64) @ np.array([81, 27, 9, 3, 1])
    return digits, -(-value * 256 // 243) == np.arange(256)


_DIGITS, _IS_WRITTEN = _base3_digits()


def _unpack_base3(grid: np.ndarray, codes: np.ndarray, name: str) -> None:
    written = _IS_WRITTEN[grid[:, :, :52]]
    written[:, :, 48:] &= _DIGITS[grid[:, :, 48:52], 4] == 0  # the last four bytes hold four digits, padded with a 0
    if not written.all():
        row, block, byte = first_true(~written)
        raise GGUFError(
            f"{name}: row {row}, block {block}, byte {byte} is {grid[row, block, byte]}, which no base-3 digits give"
        )
    for element in range(256):
        if element < 160:
            position, byte = divmod(element, 32)
        elif element < 240:
            position, byte = divmod(element - 160, 16)
            byte += 32
        else:
            position, byte = divmod(element - 240, 4)
            byte += 48
        codes[:, :, element] = _DIGITS[grid[:, :, byte], position]


CONTAINERS = (
    Container(GGMLType.TQ1_0, 36, {"ternary": _encode_tq1_0, "binary": _encode_tq1_0}, _decode_tq1_0),
    Container(GGMLType.TQ2_0, 37, {"ternary": _encode_tq2_0, "binary": _encode_tq2_0}, _decode_tq2_0),
    Container(GGMLType.Q2_0, 41, {"ternary": _encode_q2_0, "binary": _encode_q2_0}, _decode_q2_0),
)
