"""What ternary codes and blocks have in common: integer sums of codes and activations that meet two scales."""

from __future__ import annotations

import numpy as np


def integer_matmul(codes: np.ndarray, scales: np.ndarray, q: np.ndarray, q_scales: np.ndarray) -> np.ndarray:
    """y [n] = sum over activation blocks, ascending, of float(isum) * (weight scale * activation scale).

    codes int8 [n, k]; scales fp16 [n, k / group]; q int32 [k]; q_scales fp32 [k / block], block dividing group.
    """
    n, k = codes.shape
    block, group = k // len(q_scales), k // scales.shape[1]
    y = np.zeros(n, np.float32)
    for b, q_scale in enumerate(q_scales):
        span = slice(b * block, (b + 1) * block)
        isum = codes[:, span].astype(np.float64) @ q[span].astype(
            np.float64
        )  # integers below 2**53: exact in any order
        scale = scales[:, b * block // group].astype(np.float32)
        y = y + isum.astype(np.float32) * (scale * q_scale)
    return y


def scaled_row(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """codes int8 [k] times their scales fp16 [k / group], in fp32."""
    wide = codes.astype(np.float32).reshape(len(scales), -1) * scales.astype(np.float32)[:, None]
    return wide.reshape(-1)
