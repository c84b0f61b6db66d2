"""The functions of the contract: sums in their order, exp, softplus, silu, RMSNorm, the rounding of activations."""

from __future__ import annotations

import numpy as np

LANES = 16
MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds |x| < 2**22 to an integer, halves to even
MAGIC_BITS = np.int32(0x4B400000)
TINY = np.float32(2.0**-100)  # a block whose largest |x| is below it counts as zeros: its reciprocal could overflow

f32 = np.float32


def sum16(values: np.ndarray) -> np.ndarray:
    """Sum over the last axis: 16 strided lanes (element i in lane i % 16, ascending), then the tree 8, 4, 2, 1."""
    length = values.shape[-1]
    padded = np.zeros((*values.shape[:-1], -(-length // LANES) * LANES), values.dtype)
    padded[..., :length] = values
    lanes = np.zeros((*values.shape[:-1], LANES), values.dtype)
    for start in range(0, padded.shape[-1], LANES):
        lanes = lanes + padded[..., start : start + LANES]
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def exp(x: np.ndarray) -> np.ndarray:
    """e**x, x clamped to [-87, 88]; Cephes' expf polynomial. NaN stays NaN."""
    x = np.where(x < f32(-87.0), f32(-87.0), x)
    x = np.where(x > f32(88.0), f32(88.0), x)
    shifted = x * f32(1.44269504088896341) + MAGIC
    n = shifted - MAGIC
    r = x - n * f32(0.693359375)
    r = r - n * f32(-2.12194440e-4)
    p = np.full_like(r, f32(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + f32(c)
    p = p * (r * r) + r
    p = p + f32(1.0)
    exponent = shifted.view(np.int32) - MAGIC_BITS
    return p * ((exponent + np.int32(127)) << np.int32(23)).view(np.float32)


def log1p(y: np.ndarray) -> np.ndarray:
    """log(1 + y) for y >= 0: Cephes' logf of the rounded 1 + y, plus the first-order correction of that rounding."""
    u = f32(1.0) + y
    correction = (y - (u - f32(1.0))) / u
    bits = u.view(np.int32)
    exponent = (bits >> np.int32(23)) - np.int32(127)
    m = ((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32)
    high = m > f32(1.41421356)
    m = np.where(high, m * f32(0.5), m)
    e = np.where(high, exponent + np.int32(1), exponent).astype(np.float32)
    r = m - f32(1.0)
    z = r * r
    p = np.full_like(r, f32(7.0376836292e-2))
    for c in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        p = p * r + f32(c)
    p = p * r * z
    p = p + e * f32(-2.12194440e-4)
    p = p - f32(0.5) * z
    return ((r + p) + e * f32(0.693359375)) + correction


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + e**x), and x itself above 20."""
    return np.where(x > f32(20.0), x, log1p(exp(x)))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (f32(1.0) + exp(-x))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., n] scaled to unit root mean square, times weight [n]. The mean and its root are fp64: 1e30 squared fits."""
    wide = x.astype(np.float64)
    mean = sum16(wide * wide) / np.float64(x.shape[-1])
    inverse = (np.float64(1.0) / np.sqrt(mean + np.float64(f32(eps)))).astype(np.float32)
    return (x * inverse[..., None]) * weight


def hadamard(x: np.ndarray, size: int) -> np.ndarray:
    """Every `size` (a power of two) neighbours of x [k] times Sylvester's Hadamard matrix over the root of its size, in fp32.

    Sums and differences of neighbours first, then of those 2 apart, 4 apart and so on; then the factor, rounded once to fp32.
    """
    stride, parts = 1, x
    while stride < size:
        pairs = parts.reshape(-1, 2, stride)
        parts = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1)
        stride *= 2
    return parts.reshape(-1) * f32(size**-0.5)


def quantize(x: np.ndarray, block: int, levels: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Activations x [k] as (q int32 [k], scale fp32 [k / block]) with |q| <= levels and x ~ q * scale.

    A block whose largest |x| is below 2**-100 becomes zeros with the scale 0. A block that holds an Inf or a NaN becomes
    zeros with the scale NaN, so that the error reaches the logits whatever the codes are.
    """
    blocks = x.reshape(-1, block)
    # The maximum is taken over bit patterns: those of NaN and Inf are the largest, and integer maxima associate.
    amax = (blocks.view(np.int32) & np.int32(0x7FFFFFFF)).max(axis=1).view(np.float32)
    finite, used = amax < np.inf, amax >= TINY
    safe = np.where(finite & used, amax, f32(1.0))
    inverse = np.where(finite & used, levels / safe, f32(0.0))
    scale = np.where(finite, np.where(used, safe / levels, f32(0.0)), f32(np.nan))
    product = np.where(finite[:, None], blocks, f32(0.0)) * inverse[:, None]
    q = (product + MAGIC).view(np.int32) - MAGIC_BITS
    return q.reshape(-1), scale
