"""The specification: a Mamba-2 forward pass in plain numpy, one token at a time, every rounding and order spelled out.

docs/numerics.md says the same in words. Everything is fp32 unless a line says otherwise; numpy never contracts a
multiply and an add. Readable and slow on purpose: the Numba kernels must give the same bits, and the tests hold them to it.

Shapes: T tokens, d = d_model, H heads of P = headdim channels, N = d_state, G = n_groups, K = d_conv.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtime_ref.arithmetic import Activations, preset_of
from runtime_ref.weights import BlockMatrix, DenseMatrix, Matrix, TernaryMatrix, Weights

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


def matmul(matrix: Matrix, x: np.ndarray, activations: Activations) -> np.ndarray:
    """y [n] = matrix [n, k] times x [k], by the rule of the matrix's type and the activations."""
    with np.errstate(invalid="ignore"):
        if isinstance(matrix, DenseMatrix):
            return sum16(matrix.values.astype(np.float32) * x)
        if isinstance(matrix, BlockMatrix):
            q, q_scales = quantize(x, 32, activations.levels)
            return integer_matmul(matrix.codes, matrix.scales, q, q_scales)
        assert isinstance(matrix, TernaryMatrix)
        q, q_scales = quantize(x, activations.block(matrix.group, matrix.fast_block), activations.levels)
        return integer_matmul(matrix.codes, matrix.scales, q, q_scales)


def embed(matrix: Matrix, token: int) -> np.ndarray:
    """Row `token` of the embedding in fp32 [d]."""
    if isinstance(matrix, DenseMatrix):
        return matrix.values[token].astype(np.float32)
    scales = matrix.scales[token].astype(np.float32)
    width = matrix.codes.shape[1] // len(scales)
    return (matrix.codes[token].astype(np.float32).reshape(-1, width) * scales[:, None]).reshape(-1)


@dataclass
class ReferenceState:
    """conv fp32 [L, K-1, C]: the last inputs of the convolution; ssm [L, H, P, N], fp32 (exact) or fp16 (fast)."""

    conv: np.ndarray
    ssm: np.ndarray


class ReferenceModel:
    """The specification as an object: `logits = model.step(state, token)`."""

    def __init__(self, weights: Weights, profile: str) -> None:
        self.weights, self.preset = weights, preset_of(profile)

    def new_state(self) -> ReferenceState:
        c = self.weights.config
        (ssm,) = self.preset.state.arrays("ssm", (c.n_layer, c.n_heads, c.headdim, c.d_state))
        conv = np.zeros((c.n_layer, c.d_conv - 1, c.conv_dim), np.float32)
        return ReferenceState(conv, np.zeros(ssm.shape, ssm.dtype))

    def step(self, state: ReferenceState, token: int) -> np.ndarray:
        """Logits fp32 [vocab] after `token`; the state is updated in place."""
        w, c = self.weights, self.weights.config
        with np.errstate(over="ignore", invalid="ignore"):
            x = embed(w.embedding, token)
            for i in range(c.n_layer):
                x = x + self._mixer(i, rms_norm(x, w.norm[i], c.rms_eps), state)
            return matmul(w.head, rms_norm(x, w.norm_f, c.rms_eps), self.preset.activations)

    def _mixer(self, i: int, x: np.ndarray, state: ReferenceState) -> np.ndarray:
        w, c = self.weights, self.weights.config
        heads, width, n, groups = c.n_heads, c.headdim, c.d_state, c.n_groups
        projected = matmul(w.in_proj[i], x, self.preset.activations)
        z, xbc, dt = np.split(projected, [c.d_inner, c.d_inner + c.conv_dim])

        window = np.concatenate([state.conv[i], xbc[None]])  # [K, C], oldest first
        state.conv[i] = window[1:]
        total = w.conv_bias[i]
        for tap in range(c.d_conv):
            total = total + w.conv_weight[i][tap] * window[tap]
        xbc = silu(total)
        x_in = xbc[: c.d_inner].reshape(heads, width)
        b = np.repeat(xbc[c.d_inner : c.d_inner + groups * n].reshape(groups, n), heads // groups, axis=0)
        cc = np.repeat(xbc[c.d_inner + groups * n :].reshape(groups, n), heads // groups, axis=0)

        dt = softplus(dt + w.dt_bias[i])
        decay = exp(dt * w.a[i])
        stored = (state.ssm[i],)
        h = self.preset.state.read(stored) * decay[:, None, None]
        h = h + (dt[:, None] * x_in)[:, :, None] * b[:, None, :]
        self.preset.state.write(stored, h)  # y below reads h before this rounding
        y = sum16(h * cc[:, None, :]) + w.d[i][:, None] * x_in

        gated = y.reshape(-1) * silu(z)
        normed = rms_norm(gated.reshape(groups, -1), w.gate_norm[i].reshape(groups, -1), c.rms_eps)
        return matmul(w.out_proj[i], normed.reshape(-1), self.preset.activations)
