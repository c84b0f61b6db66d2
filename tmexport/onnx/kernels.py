"""The operators of the custom form computed by runtime_ref's rules, to the bit (onnxruntime-extensions' Python operators).

    options = onnxruntime.SessionOptions()
    register_kernels(options)
    session = onnxruntime.InferenceSession("model.onnx", options)   # written with --ops custom

The same file without this call runs its function bodies. What each operator computes is `runtime_ref.reference`, profile
exact; the only liberty taken here is to add up integers in another order, which is exact. This is the path for proofs:
every call hands its tensors to Python and back, so for speed use the ort form or runtime_ref itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tmexport.errors import UsageError
from tmexport.onnx.names import DOMAIN

_f32 = np.float32
_unpacked: dict[tuple[tuple[int, ...], bytes], np.ndarray] = {}  # weights by their content, unpacked once
_registered = False
_failures: list[BaseException] = []


def register_kernels(session_options: Any) -> None:
    """Make sessions with these options compute the operators of domain `tmexport` by runtime_ref's profile exact.

    Args:
        session_options: an onnxruntime.SessionOptions.

    Raises:
        UsageError: onnxruntime-extensions is not installed.
    """
    try:
        import onnxruntime_extensions as extensions
    except ImportError:
        raise UsageError("the package onnxruntime-extensions is not installed; run: pip install onnxruntime-extensions") from None  # fmt: skip
    _define(extensions)
    session_options.register_custom_ops_library(extensions.get_library_path())


def _define(extensions: Any) -> None:
    """Tell the extensions library about the operators; once a process, because it keeps them for ever."""
    global _registered
    if _registered:
        return
    op, kind = extensions.onnx_op, extensions.PyOp
    number, byte, text, whole = kind.dt_float, kind.dt_uint8, kind.dt_string, kind.dt_int64
    for name, function, shapes, inputs, attributes in (
        (
            "TernaryMatMul",
            ternary_matmul,
            _matmul_shape,
            [number, byte, number],
            {"group_size": whole, "profile": text},
        ),
        ("SelectiveScan", selective_scan, _scan_shapes, [number] * 10, {"profile": text}),
        ("RMSNorm", rms_norm, lambda x, *rest: [x.shape], [number] * 3, {"profile": text}),
        ("Q8MatMul", q8_matmul, _matmul_shape, [number, kind.dt_int8, number], {"profile": text}),
        ("DenseMatMul", dense_matmul, _matmul_shape, [number] * 2, {"profile": text}),
    ):
        outputs = [number] * (3 if function is selective_scan else 1)
        guarded = _guarded(function, shapes)
        op(op_type=f"{DOMAIN}::{name}", inputs=inputs, outputs=outputs, attrs=attributes)(guarded)
    _registered = True


def _matmul_shape(x: np.ndarray, weight: np.ndarray, *rest: np.ndarray) -> list[tuple[int, ...]]:
    return [(*x.shape[:-1], weight.shape[0])]


def _scan_shapes(projected: np.ndarray, conv: np.ndarray, ssm: np.ndarray, *rest: np.ndarray) -> list[tuple[int, ...]]:
    return [(*projected.shape[:2], ssm.shape[1] * ssm.shape[3]), conv.shape, ssm.shape]


def _guarded(function: Callable[..., Any], shapes: Callable[..., list[tuple[int, ...]]]) -> Callable[..., Any]:
    """`function`, but what it raises (Ctrl-C too) is kept for `raise_failure`: the library would end the process.

    The operator then gives NaN, so that a program which does not ask cannot take its output for a result.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            _failures.append(error)
            nothing = [np.full(shape, np.nan, np.float32) for shape in shapes(*args)]
            return nothing[0] if len(nothing) == 1 else tuple(nothing)

    return call


def raise_failure() -> None:
    """Raise what an operator raised since the last call; `OrtModel` asks after every run."""
    if _failures:
        first = _failures[0]
        _failures.clear()
        raise first


def ternary_matmul(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, group_size: int, profile: str) -> np.ndarray:
    """x [B, T, k], codes uint8 [n, k/4], scales fp32 [n, k/g] -> [B, T, n]."""
    _check_profile(profile)

    def unpack() -> np.ndarray:
        two_bit = np.stack([codes >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
        return two_bit.reshape(len(codes), -1).astype(np.float32) - _f32(1.0)

    # |q| <= 32512, so a group of 256 adds up to at most 8,323,072 < 2**24: exact in fp32, in whatever order
    return _integer_matmul(x, _once(codes, unpack), scales, group_size, np.float32)


def q8_matmul(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], codes int8 [n, k], scales fp32 [n, k/32] -> [B, T, n]."""
    _check_profile(profile)
    return _integer_matmul(x, codes, scales, 32, np.float64)


def _integer_matmul(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, block: int, exact: type) -> np.ndarray:
    """`reference.integer_matmul` for many rows of x; sums inside a block are integers that `exact` holds."""
    from runtime_ref.reference import EXACT_LEVELS, quantize

    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    with np.errstate(all="ignore"):
        q, q_scales = quantize(rows.reshape(-1), block, EXACT_LEVELS)
        q, q_scales = q.reshape(rows.shape), q_scales.reshape(len(rows), -1)
        y = np.zeros((len(rows), len(codes)), np.float32)
        for b in range(q_scales.shape[1]):
            span = slice(b * block, (b + 1) * block)
            isum = q[:, span].astype(exact) @ codes[:, span].astype(exact, copy=False).T
            y = y + isum.astype(np.float32) * (scales[:, b] * q_scales[:, b, None])
    return y.reshape(*x.shape[:-1], -1)


def dense_matmul(x: np.ndarray, weight: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], weight fp32 [n, k] -> [B, T, n]."""
    from runtime_ref.reference import sum16

    _check_profile(profile)
    with np.errstate(all="ignore"):
        rows = [sum16(weight * row) for row in x.reshape(-1, x.shape[-1])]
    return np.stack(rows).reshape(*x.shape[:-1], -1)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], weight [k] -> [B, T, k]."""
    from runtime_ref import reference

    _check_profile(profile)
    with np.errstate(all="ignore"):
        return reference.rms_norm(x, weight, float(epsilon))


def selective_scan(
    projected: np.ndarray,
    past_conv: np.ndarray,
    past_ssm: np.ndarray,
    conv_weight: np.ndarray,
    conv_bias: np.ndarray,
    dt_bias: np.ndarray,
    a: np.ndarray,
    d: np.ndarray,
    norm_weight: np.ndarray,
    epsilon: np.ndarray,
    profile: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`reference.ReferenceModel`'s mixer between the projections; shapes as in `tmexport.onnx.functions`."""
    from runtime_ref import reference as r

    _check_profile(profile)
    batch, time = projected.shape[:2]
    heads, n, width = past_ssm.shape[1:]
    channels, _, taps = conv_weight.shape
    d_inner = heads * width
    groups = (channels - d_inner) // (2 * n)
    z, xbc, dt = np.split(projected, [d_inner, d_inner + channels], axis=-1)
    window = np.concatenate([past_conv.transpose(0, 2, 1), xbc], axis=1)  # [B, K-1+T, C], oldest first
    with np.errstate(all="ignore"):
        total = conv_bias
        for tap in range(taps):
            total = total + conv_weight[:, 0, tap] * window[:, tap : tap + time]
        xbc = r.silu(total)
        x = xbc[..., :d_inner].reshape(batch, time, heads, width)
        bb, cc = (
            np.repeat(part.reshape(batch, time, groups, n), heads // groups, axis=2)
            for part in np.split(xbc[..., d_inner:], 2, axis=-1)
        )
        dt = r.softplus(dt + dt_bias)
        decay, dx = r.exp(dt * a), dt[..., None] * x
        h, y = past_ssm.transpose(0, 1, 3, 2), np.empty_like(x)
        for t in range(time):
            h = h * decay[:, t, :, None, None]
            h = h + dx[:, t, :, :, None] * bb[:, t, :, None, :]
            y[:, t] = r.sum16(h * cc[:, t, :, None, :]) + d[:, None] * x[:, t]
        gated = (y.reshape(batch, time, d_inner) * r.silu(z)).reshape(batch, time, groups, -1)
        normed = r.rms_norm(gated, norm_weight.reshape(groups, -1), float(epsilon))
    present_conv = window[:, time:].transpose(0, 2, 1)
    return normed.reshape(batch, time, d_inner), present_conv, np.ascontiguousarray(h.transpose(0, 1, 3, 2))


def _once(packed: np.ndarray, unpack: Any) -> np.ndarray:
    """`unpack()` for these bytes, made once: the library copies a weight for every call, so only its content knows it."""
    key = (packed.shape, hashlib.blake2b(packed, digest_size=16).digest())
    if key not in _unpacked:
        _unpacked[key] = unpack()
    return _unpacked[key]


def _check_profile(profile: str) -> None:
    if profile != "exact":
        raise UsageError(f"the file asks for the profile {profile!r}; these kernels compute 'exact'")
