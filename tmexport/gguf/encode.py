"""Encoding into GGML blocks. Ternary codes and scales are laid out, never quantised again.

Layouts: llama.cpp, ggml-common.h (block_tq1_0, block_tq2_0, block_q2_0, block_q8_0, block_q4_0). `decode.py` is written
independently of this file; tests compare both with gguf's own codecs.
"""

from __future__ import annotations

import numpy as np

from tmexport.errors import NotTernaryError, TmexportError
from tmexport.gguf.types import GGMLType
from tmexport.ternary import TernaryTensor, first_true

_FP16_OVERFLOW = 65520.0  # rounds to infinity
_ROWS_AT_ONCE = 256  # keeps the intermediates in cache and the peak memory at one encoded tensor


def encode_ternary(tensor: TernaryTensor, kind: GGMLType, name: str) -> np.ndarray:
    """Codes and scales as blocks: uint8 [n, row_bytes].

    Raises:
        NotTernaryError: a block of `kind` would have to hold two different scales; the row and group are named.
    """
    n, k = tensor.shape
    if k % kind.block_size:
        raise NotTernaryError(f"{name}: rows of {k} weights do not divide into {kind.name} blocks of {kind.block_size}")
    scales = scales_per_block(tensor, kind.block_size, f"{name} as {kind.name}")
    encoder = {GGMLType.TQ1_0: _tq1_0, GGMLType.TQ2_0: _tq2_0, GGMLType.Q2_0: _q2_0}[kind]
    blocks = np.empty((n, k // kind.block_size, kind.block_bytes), np.uint8)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        digits = (tensor.codes[rows] + 1).view(np.uint8).reshape(-1, k // kind.block_size, kind.block_size)
        scale_bytes = np.ascontiguousarray(scales[rows]).view(np.uint8).reshape(*digits.shape[:2], 2)
        blocks[rows] = encoder(digits, scale_bytes)
    return blocks.reshape(n, -1)


def scales_per_block(tensor: TernaryTensor, block: int, name: str) -> np.ndarray:
    """The scale of every block, fp16 [n, k / block].

    Raises:
        NotTernaryError: groups inside one block have different scales.
    """
    if block <= tensor.group_size:
        return np.repeat(tensor.scales, tensor.group_size // block, axis=1)
    joined = tensor.scales.reshape(tensor.shape[0], -1, block // tensor.group_size)
    differs = (joined != joined[:, :, :1]).any(axis=2)
    if differs.any():
        row, index = first_true(differs)
        raise NotTernaryError(
            f"{name}: row {row}, groups {index * joined.shape[2]} to {(index + 1) * joined.shape[2] - 1} have different scales, "
            f"but a block of {block} stores one; groups of {tensor.group_size} need --type q2_0"
        )
    return joined[:, :, 0]


def _tq1_0(digits: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """Base 3, the first element most significant: 32 bytes of 5 elements, 16 of 5, 4 of 4, then the scale."""

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
            scale_bytes,
        ],
        axis=2,
    )


def _tq2_0(digits: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """Each half block of 128: byte m holds the elements m, m + 32, m + 64, m + 96; then the scale."""
    lanes = digits.reshape(*digits.shape[:2], 2, 4, 32)
    packed = lanes[:, :, :, 0] | lanes[:, :, :, 1] << 2 | lanes[:, :, :, 2] << 4 | lanes[:, :, :, 3] << 6
    return np.concatenate([packed.reshape(*digits.shape[:2], 64), scale_bytes], axis=2)


def _q2_0(digits: np.ndarray, scale_bytes: np.ndarray) -> np.ndarray:
    """The scale, then 4 consecutive elements a byte, lowest bits first."""
    quads = digits.reshape(*digits.shape[:2], 16, 4)
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return np.concatenate([scale_bytes, packed], axis=2)


def encode_float(values: np.ndarray, kind: GGMLType, name: str) -> np.ndarray:
    """A matrix [n, k], fp32 or fp16, in a float or quantised type: uint8 [n, row_bytes].

    Q8_0 and Q4_0 round as llama.cpp's reference quantisers do (ggml-quants.c).

    Raises:
        TmexportError: a row does not divide into blocks, or a value does not fit the type (NaN, infinite, fp16 overflow).
    """
    n, k = values.shape
    if k % kind.block_size:
        raise TmexportError(f"{name}: rows of {k} values do not divide into {kind.name} blocks of {kind.block_size}")
    encoder = {GGMLType.F32: _f32, GGMLType.F16: _f16, GGMLType.Q8_0: _q8_0, GGMLType.Q4_0: _q4_0}[kind]
    out = np.empty((n, kind.row_bytes(k)), np.uint8)
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        part = np.ascontiguousarray(values[rows], np.float32)
        if not np.isfinite(part).all():
            raise TmexportError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")
        if kind is not GGMLType.F32 and np.abs(part).max(initial=0) >= _FP16_OVERFLOW:
            raise TmexportError(f"{name}: holds {np.abs(part).max():.6g}, which overflows fp16 (65504)")
        out[rows] = encoder(part).reshape(-1, out.shape[1])
    return out


def _f32(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8)


def _f16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint8)


def _inverse(d: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


def _q8_0(values: np.ndarray) -> np.ndarray:
    """d = max|x| / 127, q = round(x / d) with halves away from zero; the scale first."""
    x = values.reshape(values.shape[0], -1, 32)
    d = np.abs(x).max(axis=2, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    rounded = whole + (magnitude - whole >= np.float32(0.5))  # exact: no sum that could round up to the next integer
    q = np.copysign(rounded, scaled).astype(np.int8)
    return np.concatenate([d.astype(np.float16).view(np.uint8), q.view(np.uint8)], axis=2)


def _q4_0(values: np.ndarray) -> np.ndarray:
    """d = (the value of largest magnitude) / -8, q = trunc(x / d + 8.5) up to 15; element j with j + 16 in one byte."""
    x = values.reshape(values.shape[0], -1, 32)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=2)[:, :, None], axis=2)
    d = extreme / np.float32(-8)
    q = np.minimum(15, np.trunc(x * _inverse(d) + np.float32(8.5))).astype(np.uint8)
    packed = q[:, :, :16] | q[:, :, 16:] << 4
    return np.concatenate([d.astype(np.float16).view(np.uint8), packed], axis=2)
