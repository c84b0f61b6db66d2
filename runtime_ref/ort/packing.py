"""The weights of the custom form's operators in the kernels' layout."""

from __future__ import annotations

import numpy as np

from runtime_ref.kernels.kinds import pack_blocks
from runtime_ref.kernels.packed import Packed
from runtime_ref.kernels.packed.dense import PackedFloat
from tmexport.errors import UsageError
from tmexport.types import GGMLType


def pack_ternary(codes: np.ndarray, scales: np.ndarray) -> Packed:
    """codes uint8 [n, k/4] (the checkpoint's packing), scales fp32 [n, k/g] that fp16 holds -> the kernels' layout.

    The detour is a Q2_0 tensor: its blocks of 64 hold the scale and then the codes' own bytes.

    Raises:
        UsageError: rows that are no multiple of 64, or scales that fp16 does not hold.
        GGUFError: a code or a scale is none.
    """
    n, k, groups = len(codes), codes.shape[1] * 4, scales.shape[1]
    if k % 64 or not groups or k // 64 % groups:
        raise UsageError(f"a ternary weight has rows of {k} and {groups} scales; expected groups of whole 64s")
    blocks = np.empty((n, k // 64, 18), np.uint8)
    blocks[..., :2] = np.repeat(_half(scales), k // 64 // groups, axis=1)[..., None].view(np.uint8)
    blocks[..., 2:] = codes.reshape(n, k // 64, 16)
    return pack_blocks(blocks.reshape(n, -1), GGMLType.Q2_0, k, k // groups, "a ternary weight")


def pack_q8(codes: np.ndarray, scales: np.ndarray) -> Packed:
    """codes int8 [n, k], scales fp32 [n, k/32] that fp16 holds -> the kernels' layout. Raises: as `pack_ternary`."""
    return _pack_blocks(codes.view(np.uint8), scales, codes.shape[1], GGMLType.Q8_0)


def pack_q4(codes: np.ndarray, scales: np.ndarray) -> Packed:
    """codes uint8 [n, k/2] (the checkpoint's packing), scales fp32 [n, k/32] that fp16 holds. Raises: as `pack_ternary`."""
    k = codes.shape[1] * 2
    fields = np.stack([codes & 15, codes >> 4], axis=2).reshape(len(codes), k)
    halves = fields[:, : k // 32 * 32].reshape(len(codes), -1, 2, 16)  # a Q4_0 has element j and j + 16 in one byte
    packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(len(codes), -1)
    return _pack_blocks(packed, scales, k, GGMLType.Q4_0)


def _pack_blocks(packed: np.ndarray, scales: np.ndarray, k: int, kind: GGMLType) -> Packed:
    n, what = len(packed), f"a weight of {kind.name}"
    if k % 32 or scales.shape != (n, k // 32):
        raise UsageError(f"{what} has rows of {k} and {scales.shape[-1]} scales; expected one for every 32")
    blocks = np.empty((n, k // 32, kind.block_bytes), np.uint8)
    blocks[..., :2] = _half(scales)[..., None].view(np.uint8)
    blocks[..., 2:] = packed.reshape(n, k // 32, -1)
    return pack_blocks(blocks.reshape(n, -1), kind, k, None, what)


def pack_dense(values: np.ndarray) -> Packed:
    """values fp32 [n, k] as they lie. Raises UsageError if k is no multiple of 16."""
    sixteens("rows of a weight", values.shape[1])
    return PackedFloat(values)


def _half(scales: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        half = scales.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), scales):
        raise UsageError("a weight has a scale that fp16 does not hold; expected those of a file by `tmexport onnx`")
    return half


def sixteens(what: str, size: int) -> int:
    """The size. Raises UsageError unless the kernels' vectors of 16 divide it."""
    if size < 1 or size % 16:
        raise UsageError(f"{what} have {size} values; the kernels need a multiple of 16")
    return size
