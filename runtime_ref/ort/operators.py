"""The kernels one operator at a time, for a program that brings arrays of its own (`runtime_ref.ort.custom_ops`).

Profile exact, one thread. Weights are in the layout of `kernels/packed/`; the functions give the bits of
`runtime_ref.reference` for many rows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels.cache import cached, source_digest
from runtime_ref.kernels.convolution import Convolution, convolve
from runtime_ref.kernels.isa import Isa, select
from runtime_ref.kernels.mamba2 import GateNorm, Scan, scan_head
from runtime_ref.kernels.matmul import multiply, prepare
from runtime_ref.kernels.norm import rms_norm as norm_row
from runtime_ref.kernels.packed import Packed
from runtime_ref.kernels.scratch import CHUNK, Room, Scratch, activations, allocate
from runtime_ref.kernels.vector import address
from runtime_ref.ort.packing import sixteens
from runtime_ref.reference.attention import attend

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

_EXACT = PRESETS["exact"]
_WORDS = 4096  # compared before looking whether they were equal


@cache
def _isa() -> Isa:
    return select()  # asks LLVM, which takes longer than a small product


def matmul(x: np.ndarray, packed: Packed, n: int, block: int) -> np.ndarray:
    """x fp32 [R, k] times a packed matrix [n, k] -> fp32 [R, n]; `block` activations share a scale."""
    rows, k = x.shape
    out = np.empty((rows, n), np.float32)
    s = _scratch(**activations(min(rows, CHUNK), k))
    for start in range(0, rows, CHUNK):
        part = x[start : start + CHUNK]
        s.wide[: len(part), :k] = part
        _matmul(_isa(), _EXACT.activations, packed, s, len(part), k, block, out[start : start + CHUNK])
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """`reference.rms_norm` of x fp32 [R, k] with weight [k]."""
    sixteens("the rows to normalise", x.shape[1])
    out = np.empty_like(x)
    _rms_norm(x, weight, out, float(np.float32(eps)))
    return out


class Mixer(NamedTuple):
    """The small tensors of a Mamba-2 mixer, fp32: conv_weight [K, C], the oldest input's first, conv_bias [C]; dt_bias, a
    (= -exp(A_log)) and d [H]; gate_norm [d_inner], None without that norm.
    """

    conv_weight: np.ndarray
    conv_bias: np.ndarray
    dt_bias: np.ndarray
    a: np.ndarray
    d: np.ndarray
    gate_norm: np.ndarray | None


def selective_scan(
    projected: np.ndarray, past_conv: np.ndarray, past_ssm: np.ndarray, mixer: Mixer, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mixer between its projections: projected fp32 [B, T, d_in_proj], past_conv [B, C, K-1], past_ssm [B, H, N, P].

    Returns the gated, normalised y [B, T, d_inner], and the new past_conv and past_ssm.

    Raises:
        UsageError: headdim or d_state is no multiple of 16.
    """
    batch, time = projected.shape[:2]
    heads, n, width = past_ssm.shape[1:]
    channels = mixer.conv_weight.shape[1]
    d_inner = heads * width
    for what, size in (("the channels of a head", width), ("a channel's states", n)):
        sixteens(what, size)
    groups = (channels - d_inner) // (2 * n)
    convolution = Convolution(mixer.conv_weight, mixer.conv_bias, d_inner, 0, 0)
    scan = Scan(heads, width, n, groups, mixer.dt_bias, mixer.a, mixer.d, 0, 0)
    gate = GateNorm(np.zeros(0, np.float32), 0, 0.0, 0)
    if mixer.gate_norm is not None:
        gate = GateNorm(mixer.gate_norm, groups, float(np.float32(eps)), 0)
    y = np.empty((batch, time, d_inner), np.float32)
    conv, ssm = np.empty_like(past_conv), np.empty_like(past_ssm)
    for b in range(batch):
        s = _scratch(wide=y[b], proj=projected[b], xbc=np.empty((time, channels), np.float32))
        _scan(_isa(), _EXACT.state, convolution, scan, gate, s, past_conv[b], past_ssm[b], conv[b], ssm[b])
    return y, conv, ssm


def causal_attention(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: np.float32) -> np.ndarray:
    """`reference.attention` between the turned queries and the output's product, all heads at once.

    q fp32 [B, T, H * D], keys and values [B, G, S, D] -> [B, T, H * D]; query t sees the first S - T + t + 1 positions.
    """
    batch, time = q.shape[:2]
    positions, width = keys.shape[2:]
    out = np.empty_like(q)
    with np.errstate(over="ignore", invalid="ignore"):
        for b, t in np.ndindex(batch, time):
            seen = positions - time + t + 1
            out[b, t] = attend(q[b, t].reshape(-1, width), keys[b, :, :seen], values[b, :, :seen], scale).reshape(-1)
    return out


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two contiguous arrays of one shape and dtype hold the same bytes, at the speed of memory."""
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    whole = len(a) // 8 * 8
    return bool(_same(a[:whole].view(np.uint64), b[:whole].view(np.uint64))) and bytes(a[whole:]) == bytes(b[whole:])


_UNUSED = allocate(1, Room())._asdict()


def _scratch(**arrays: np.ndarray) -> Scratch:
    return Scratch(**(_UNUSED | arrays))


def _compiled(digest: int) -> tuple[Callable[..., Any], ...]:
    """The compiled functions; `digest` is a free variable of each, which makes it part of the cache's key."""

    @cached()
    def matmul(isa, activations, packed, s, rows, k, block, out):
        _ = digest
        for r in range(rows):
            prepare(activations, packed, s, r, k, block)
        multiply(isa, activations, packed, s, rows, k, block, out, False, 0, 1)

    @cached()
    def rms_norm(x, weight, out, eps):
        _ = digest
        for r in range(x.shape[0]):
            norm_row(x[r], weight, out[r], eps)

    @cached()
    def scan(isa, state, convolution, scan, gate, s, past_conv, past_ssm, present_conv, present_ssm):
        _ = digest
        rows, (taps, channels) = s.wide.shape[0], convolution.weight.shape
        conv = np.empty((taps - 1, channels), np.float32)
        for c in range(channels):
            for tap in range(taps - 1):
                conv[tap, c] = past_conv[c, tap]
        convolve(convolution, s, address(conv), 0, rows, 0, channels)
        for c in range(channels):
            for tap in range(taps - 1):
                present_conv[c, tap] = conv[tap, c]
        ssm = np.empty((scan.n_heads, scan.headdim, scan.d_state), np.float32)
        for h in range(scan.n_heads):
            for p in range(scan.headdim):
                for n in range(scan.d_state):
                    ssm[h, p, n] = past_ssm[h, n, p]
            scan_head(isa, state, scan, s, address(ssm[h]), 0, 0, 0, rows, h)
            for n in range(scan.d_state):
                for p in range(scan.headdim):
                    present_ssm[h, n, p] = ssm[h, p, n]
        part = gate.weight.shape[0] // max(1, gate.groups)
        for r in range(rows):
            for g in range(gate.groups):
                span = s.wide[r, g * part : (g + 1) * part]
                norm_row(span, gate.weight[g * part : (g + 1) * part], span, gate.eps)

    @cached()
    def same(a, b):
        _ = digest
        for start in range(0, a.shape[0], _WORDS):
            differ = np.uint64(0)
            for i in range(start, min(start + _WORDS, a.shape[0])):
                differ |= a[i] ^ b[i]
            if differ:
                return False
        return True

    return matmul, rms_norm, scan, same


_matmul, _rms_norm, _scan, _same = _compiled(source_digest())
