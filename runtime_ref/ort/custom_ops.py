"""The operators of the custom form computed by runtime_ref's kernels, to the bit.

    options = onnxruntime.SessionOptions()
    register_kernels(options)
    session = onnxruntime.InferenceSession("model.onnx", options)   # written with --ops custom

The same file without this call runs its function bodies. What each operator computes is `runtime_ref.reference`, profile
exact; runtime_ref and Numba are imported when this is called. On Linux (x86-64, aarch64) onnxruntime calls the compiled kernels itself
(`runtime_ref.ort.native`). Elsewhere it calls the Python functions below through onnxruntime-extensions, with the same bits: every
call then copies its tensors to Python and back, the weights too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime_ref.ort import shim
from tmexport.errors import UsageError
from tmexport.onnx.names import DOMAIN
from tmexport.threads import default_threads

if TYPE_CHECKING:
    from runtime_ref.kernels.packed import Packed

_SAMPLE = 64  # bytes of a weight by which it is looked up, before all of it is compared
_packed: dict[tuple[Any, ...], list[tuple[tuple[np.ndarray, ...], Packed]]] = {}
_registered = False
_failures: list[BaseException] = []


def register_kernels(session_options: Any) -> bool:
    """Make sessions with these options compute the operators of domain `tmexport` by runtime_ref's profile exact.

    Args:
        session_options: an onnxruntime.SessionOptions, with the number of threads it will have.

    Returns: whether onnxruntime calls the kernels itself; otherwise through Python.

    Raises:
        UsageError: Numba is not installed; or onnxruntime-extensions, where it is needed.
    """
    _failures.clear()  # of sessions before
    if shim.supported():
        try:
            from runtime_ref.ort import native
        except ImportError as error:
            raise UsageError(f"runtime_ref's kernels cannot be imported: {error}; run: pip install numba") from None
        with contextlib.suppress(OSError):  # a system that runs no code from memory: through Python
            native.register(session_options, session_options.intra_op_num_threads or default_threads())
            return True
    _register_functions(session_options)
    return False


def _register_functions(session_options: Any) -> None:
    """The Python functions, by onnxruntime-extensions."""
    try:
        import onnxruntime_extensions as extensions
    except ImportError:
        raise UsageError("the package onnxruntime-extensions is not installed; run: pip install onnxruntime-extensions") from None  # fmt: skip
    try:
        import runtime_ref.ort.operators  # noqa: F401  # Numba, before onnxruntime's threads need it
    except ImportError as error:
        raise UsageError(f"runtime_ref's kernels cannot be imported: {error}; run: pip install numba") from None
    _packed.clear()  # weights of sessions that may be gone; one that lives packs its own again
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
        ("GatedScan", gated_scan, _scan_shapes, [number] * 8, {"profile": text}),
        ("CausalAttention", causal_attention, lambda q, *rest: [q.shape], [number] * 4, {"profile": text}),
        ("SwiGLU", swiglu, lambda gate, up: [gate.shape], [number] * 2, {"profile": text}),
        ("Q4MatMul", q4_matmul, _matmul_shape, [number, byte, number], {"profile": text}),
        ("RMSNorm", rms_norm, lambda x, *rest: [x.shape], [number] * 3, {"profile": text}),
        ("Q8MatMul", q8_matmul, _matmul_shape, [number, kind.dt_int8, number], {"profile": text}),
        ("DenseMatMul", dense_matmul, _matmul_shape, [number] * 2, {"profile": text}),
    ):
        outputs = [number] * (3 if shapes is _scan_shapes else 1)
        guarded = _guarded(function, shapes)
        op(op_type=f"{DOMAIN}::{name}", inputs=inputs, outputs=outputs, attrs=attributes)(guarded)
    _registered = True


class _Result(np.ndarray):
    """An array that onnxruntime-extensions copies as it is: by itself it would make a Python float of every element."""

    def flatten(self, order: Any = "C") -> _Result:  # what the library calls, and on its result
        return self

    def tolist(self) -> np.ndarray:  # type: ignore[override]  # this
        return self.view(np.ndarray)


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
            results = function(*args, **kwargs)
            results = results if isinstance(results, tuple) else (results,)
        except BaseException as error:
            keep_failure(error)
            results = tuple(np.full(shape, np.nan, np.float32) for shape in shapes(*args))
        fast = tuple(np.ascontiguousarray(result).view(_Result) for result in results)
        return fast[0] if len(fast) == 1 else fast

    return call


def keep_failure(error: BaseException) -> None:
    """What was raised where onnxruntime cannot pass it on."""
    _failures.append(error)


def raise_failure() -> None:
    """Raise what an operator raised since the last call; `OrtModel` asks after every run, and when it cannot load."""
    if _failures:
        first = _failures[0]
        _failures.clear()
        raise first


def ternary_matmul(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, group_size: int, profile: str) -> np.ndarray:
    """x [B, T, k], codes uint8 [n, k/4], scales fp32 [n, k/g] -> [B, T, n]."""
    from runtime_ref.ort.operators import matmul
    from runtime_ref.ort.packing import pack_ternary

    _check_profile(profile)
    return _by_rows(lambda rows: matmul(rows, _once(pack_ternary, codes, scales), len(codes), group_size), x)


def q8_matmul(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], codes int8 [n, k], scales fp32 [n, k/32] -> [B, T, n]."""
    from runtime_ref.ort.operators import matmul
    from runtime_ref.ort.packing import pack_q8

    _check_profile(profile)
    return _by_rows(lambda rows: matmul(rows, _once(pack_q8, codes, scales), len(codes), 32), x)


def q4_matmul(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], codes uint8 [n, k/2], scales fp32 [n, k/32] -> [B, T, n]."""
    from runtime_ref.ort.operators import matmul
    from runtime_ref.ort.packing import pack_q4

    _check_profile(profile)
    return _by_rows(lambda rows: matmul(rows, _once(pack_q4, codes, scales), len(codes), 32), x)


def dense_matmul(x: np.ndarray, weight: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], weight fp32 [n, k] -> [B, T, n]."""
    from runtime_ref.ort.operators import matmul
    from runtime_ref.ort.packing import pack_dense

    _check_profile(profile)
    return _by_rows(lambda rows: matmul(rows, pack_dense(weight), len(weight), 32), x)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: np.ndarray, profile: str) -> np.ndarray:
    """x [B, T, k], weight [k] -> [B, T, k]."""
    from runtime_ref.ort import operators

    _check_profile(profile)
    return _by_rows(lambda rows: operators.rms_norm(rows, weight, float(epsilon)), x)


def swiglu(gate: np.ndarray, up: np.ndarray, profile: str) -> np.ndarray:
    """silu(gate) * up, both [B, T, k]."""
    from runtime_ref.reference.functions import silu

    _check_profile(profile)
    with np.errstate(over="ignore", invalid="ignore"):
        gated: np.ndarray = silu(gate) * up
    return gated


def causal_attention(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: np.ndarray, profile: str
) -> np.ndarray:
    """q [B, T, H * D], keys and values [B, G, S, D] -> [B, T, H * D]."""
    from runtime_ref.ort import operators

    _check_profile(profile)
    return operators.causal_attention(q, keys, values, np.float32(scale))


def selective_scan(*inputs: np.ndarray, profile: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mixer between its projections; inputs and shapes as in `tmexport.onnx.functions`."""
    *scanned, norm_weight, epsilon = inputs
    return _scan(scanned, norm_weight, float(epsilon), profile)


def gated_scan(*inputs: np.ndarray, profile: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same without a norm."""
    return _scan(list(inputs), None, 0.0, profile)


def _scan(
    inputs: list[np.ndarray], norm_weight: np.ndarray | None, epsilon: float, profile: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from runtime_ref.ort import operators

    _check_profile(profile)
    projected, past_conv, past_ssm, conv_weight, conv_bias, dt_bias, a, d = inputs
    taps_first = np.ascontiguousarray(conv_weight[:, 0].T)
    mixer = operators.Mixer(taps_first, conv_bias, dt_bias, a, d, norm_weight)
    return operators.selective_scan(projected, past_conv, past_ssm, mixer, epsilon)


def _by_rows(function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
    """function of x as [B * T, k], its result as [B, T, n]."""
    return function(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _once(pack: Callable[..., Packed], *weight: np.ndarray) -> Packed:
    """`pack(*weight)`, made once for these bytes: the library copies a weight for every call, so only its content knows it."""
    from runtime_ref.ort.operators import same

    key = (pack, *((array.shape, array.reshape(-1)[:_SAMPLE].tobytes()) for array in weight))
    known = _packed.setdefault(key, [])
    for stored, packed in known:
        if all(same(a, b) for a, b in zip(weight, stored, strict=True)):
            return packed
    packed = pack(*weight)
    known.append((weight, packed))
    return packed


def _check_profile(profile: str) -> None:
    if profile != "exact":
        raise UsageError(f"the file asks for the profile {profile!r}; these kernels compute 'exact'")
