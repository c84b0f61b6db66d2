"""Decoding GGML blocks. Written from the format alone, sharing nothing with `encode.py`: verify relies on that."""

from __future__ import annotations

import numpy as np

from tmexport.errors import GGUFError
from tmexport.gguf.types import GGMLType
from tmexport.ternary import first_true


def decode_ternary(blocks: np.ndarray, kind: GGMLType, k: int, name: str = "tensor") -> tuple[np.ndarray, np.ndarray]:
    """The codes and scales stored in ternary blocks.

    Args:
        blocks: uint8 [n, row_bytes].
        kind: TQ1_0, TQ2_0 or Q2_0.
        k: weights a row.
        name: for the error.

    Returns:
        codes int8 [n, k] and scales fp16 [n, k / block_size].

    Raises:
        GGUFError: a 2-bit code 3, a byte that no five base-3 digits give, or a scale that is not +0 or a positive normal fp16.
    """
    n = blocks.shape[0]
    grid = blocks.reshape(n, k // kind.block_size, kind.block_bytes)
    scale_at = 0 if kind is GGMLType.Q2_0 else kind.block_bytes - 2
    scales = np.ascontiguousarray(grid[:, :, scale_at : scale_at + 2]).view("<f2")[:, :, 0]
    bits = scales.view(np.uint16)
    bad = (bits != 0) & ((bits < 0x0400) | (bits >= 0x7C00))
    if bad.any():
        row, block = first_true(bad)
        raise GGUFError(
            f"{name}: row {row}, block {block} has the scale {scales[row, block]}; expected +0 or a positive normal fp16"
        )
    codes = np.empty((n, k // kind.block_size, kind.block_size), np.int8)
    if kind is GGMLType.TQ1_0:
        _unpack_base3(grid, codes, name)
    elif kind is GGMLType.TQ2_0:
        for element in range(256):
            half, within = divmod(element, 128)
            shift, byte = divmod(within, 32)
            codes[:, :, element] = (grid[:, :, 32 * half + byte] >> (2 * shift)) & 3
    else:
        for element in range(64):
            codes[:, :, element] = (grid[:, :, 2 + element // 4] >> (2 * (element % 4))) & 3
    codes -= 1
    if codes.max(initial=0) > 1:
        row, block, _ = first_true(codes > 1)
        raise GGUFError(f"{name}: row {row}, block {block} holds the 2-bit code 3; expected 0, 1 or 2")
    return codes.reshape(n, k), scales


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


def dequantize(blocks: np.ndarray, kind: GGMLType, k: int, name: str = "tensor") -> np.ndarray:
    """The values of a tensor: uint8 [n, row_bytes] -> fp32 [n, k].

    Raises:
        GGUFError: the blocks of a ternary type are damaged, or a value is NaN or infinite.
    """
    values = _dequantize(np.ascontiguousarray(blocks), kind, k, name)
    finite = np.isfinite(values)
    if not finite.all():
        row, column = first_true(~finite)
        raise GGUFError(f"{name}: row {row}, column {column} is {values[row, column]}; expected a finite number")
    return values


def _dequantize(raw: np.ndarray, kind: GGMLType, k: int, name: str) -> np.ndarray:
    n = raw.shape[0]
    if kind.is_ternary:
        codes, scales = decode_ternary(raw, kind, k, name)
        return (codes.reshape(n, -1, kind.block_size) * scales.astype(np.float32)[:, :, None]).reshape(n, k)
    if kind is GGMLType.F32:
        return raw.view("<f4").astype(np.float32, copy=False)
    if kind is GGMLType.F16:
        return raw.view("<f2").astype(np.float32)
    if kind is GGMLType.BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    grid = raw.reshape(n, k // 32, kind.block_bytes)
    d = np.ascontiguousarray(grid[:, :, :2]).view("<f2").astype(np.float32)
    if kind is GGMLType.Q8_0:
        q = np.ascontiguousarray(grid[:, :, 2:]).view(np.int8).astype(np.float32)
    else:
        q = np.concatenate([grid[:, :, 2:] & 15, grid[:, :, 2:] >> 4], axis=2).astype(np.float32) - np.float32(8)
    return (q * d).reshape(n, k)
