"""exp, softplus, silu: the operations of `runtime_ref.reference` in the same order, on scalars and on vectors of 16."""

from __future__ import annotations

import numpy as np

from runtime_ref.kernels.compiled import kernel
from runtime_ref.kernels.intrinsics import bits_float, float_bits
from runtime_ref.kernels.vector import (
    bits,
    both,
    clamp_above,
    clamp_below,
    floats,
    larger,
    largest,
    load,
    shift_left,
    splat,
)

# ruff: noqa: ANN001, ANN201 - compiled functions, typed by Numba

MAGIC = np.float32(12582912.0)
MAGIC_BITS = np.int32(0x4B400000)
ONE, HALF, ZERO = np.float32(1.0), np.float32(0.5), np.float32(0.0)
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
BIAS, MANTISSA = np.int32(127), np.int32(23)
NO_BITS, ABS_BITS = np.int32(0), np.int32(0x7FFFFFFF)


@kernel
def largest_bits(row, first, end):
    """The bit pattern of the largest |x| of row[first:end] fp32, whole vectors of 16; NaN counts as the largest."""
    top = splat(NO_BITS)
    for i in range(first, end, 16):
        top = larger(top, both(bits(load(row, i)), splat(ABS_BITS)))
    return largest(top)


@kernel
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
    return p * bits_float(np.int32((exponent + BIAS) << MANTISSA))


@kernel
def log1p(y):
    u = ONE + y
    correction = (y - (u - ONE)) / u
    pattern = float_bits(u)
    exponent = np.int32(np.int32(pattern >> MANTISSA) - BIAS)
    m = bits_float(np.int32((pattern & np.int32(0x7FFFFF)) | np.int32(0x3F800000)))
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


@kernel
def softplus(x):
    return x if x > SOFTPLUS_LINEAR else log1p(exp(x))


@kernel
def vector_exp(x):
    """`exp` of 16 lanes."""
    x = clamp_above(clamp_below(x, splat(EXP_LO)), splat(EXP_HI))
    shifted = x * splat(LOG2E) + splat(MAGIC)
    n = shifted - splat(MAGIC)
    r = x - n * splat(LN2_HI)
    r = r - n * splat(LN2_LO)
    p = splat(E0) * r + splat(E1)
    p = p * r + splat(E2)
    p = p * r + splat(E3)
    p = p * r + splat(E4)
    p = p * r + splat(E5)
    p = p * (r * r) + r
    p = p + splat(ONE)
    exponent = bits(shifted) - splat(MAGIC_BITS)
    return p * floats(shift_left(exponent + splat(BIAS), splat(MANTISSA)))


@kernel
def vector_silu(x):
    """silu of 16 lanes: x / (1 + exp(-x))."""
    return x / (splat(ONE) + vector_exp(negated(x)))


@kernel
def negated(x):
    """-x by its sign bit, as numpy negates: -(+0) is -0."""
    return floats(bits(x) + splat(SIGN))  # adding the sign bit flips it


SIGN = np.int32(-(2**31))
