"""exp, softplus, silu: the operations of `runtime_ref.reference`, one scalar at a time, in the same order."""

from __future__ import annotations

import numpy as np
from numba import njit

from runtime_ref.kernels.intrinsics import bits_float, float_bits

# ruff: noqa: ANN001, ANN201 - compiled functions; their types are in the docstrings of the callers

MAGIC = np.float32(12582912.0)
MAGIC_BITS = np.int32(0x4B400000)
ONE, HALF = np.float32(1.0), np.float32(0.5)
LOG2E, LN2_HI, LN2_LO = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_LO, EXP_HI, SOFTPLUS_LINEAR = np.float32(-87.0), np.float32(88.0), np.float32(20.0)
E0, E1, E2, E3, E4, E5 = (
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
SQRT2 = np.float32(1.41421356)
L0, L1, L2, L3, L4, L5, L6, L7, L8 = (
    np.float32(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)


@njit
def exp(x):
    x = EXP_LO if x < EXP_LO else x
    x = EXP_HI if x > EXP_HI else x
    shifted = x * LOG2E + MAGIC
    n = shifted - MAGIC
    r = x - n * LN2_HI
    r = r - n * LN2_LO
    p = E0 * r + E1
    p = p * r + E2
    p = p * r + E3
    p = p * r + E4
    p = p * r + E5
    p = p * (r * r) + r
    p = p + ONE
    exponent = np.int32(float_bits(shifted) - MAGIC_BITS)
    return p * bits_float(np.int32((exponent + np.int32(127)) << np.int32(23)))


@njit
def log1p(y):
    u = ONE + y
    correction = (y - (u - ONE)) / u
    bits = float_bits(u)
    exponent = np.int32(np.int32(bits >> np.int32(23)) - np.int32(127))
    m = bits_float(np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)))
    if m > SQRT2:
        m = m * HALF
        exponent = np.int32(exponent + np.int32(1))
    e = np.float32(exponent)
    r = m - ONE
    z = r * r
    p = L0 * r + L1
    p = p * r + L2
    p = p * r + L3
    p = p * r + L4
    p = p * r + L5
    p = p * r + L6
    p = p * r + L7
    p = p * r + L8
    p = p * r * z
    p = p + e * LN2_LO
    p = p - HALF * z
    return ((r + p) + e * LN2_HI) + correction


@njit
def softplus(x):
    return x if x > SOFTPLUS_LINEAR else log1p(exp(x))


@njit
def silu(x):
    return x / (ONE + exp(-x))
