"""The mathematics that every branch uses, as nodes of standard ONNX operators (ai.onnx 15 and later).

Names: b is the Builder; every other string is the name of a tensor. Shapes: B batch, T time.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tmexport.onnx.builder import Builder

FOREVER = np.iinfo(np.int64).max  # the end of a Slice that has none

# byte -> its four codes as fp32, lowest bits first (the checkpoint's packing)
CODE_TABLE = np.stack([(np.arange(256) >> shift & 3).astype(np.float32) - 1 for shift in (0, 2, 4, 6)], axis=1)

# byte -> its two codes, lowest bits first
INT4_TABLE = np.stack([(np.arange(256) >> shift & 15).astype(np.float32) - 8 for shift in (0, 4)], axis=1)


def silu(b: Builder, x: str) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x))


def rms_norm(b: Builder, x: str, weight: str, eps: str, size: int, out: str = "") -> str:
    """x [..., size] / sqrt(mean(x**2) + eps) * weight."""
    mean = b.op("Mul", b.op("ReduceSum", b.op("Mul", x, x), b.ints(-1), keepdims=1), b.scalar(1.0 / size))
    return b.op("Mul", b.op("Div", x, b.op("Sqrt", b.op("Add", mean, eps))), weight, out=out)


def unpack_ternary(b: Builder, codes: str, scales: str, group_shape: str) -> str:
    """codes uint8 [n, k/4], scales fp32 [n, k/g] -> fp32 [n, k]; group_shape is the int64 tensor (0, -1, g)."""
    table = b.op("Gather", b.const(CODE_TABLE), b.op("Cast", codes, to=TensorProto.INT32), axis=0)
    grouped = b.op("Reshape", table, group_shape)
    scaled = b.op("Mul", grouped, b.op("Unsqueeze", scales, b.ints(2)))
    return b.op("Reshape", scaled, b.ints(0, -1))


def unpack_int4(b: Builder, codes: str, scales: str) -> str:
    """codes uint8 [n, k/2], scales fp32 [n, k/32] -> fp32 [n, k]."""
    table = b.op("Gather", b.const(INT4_TABLE), b.op("Cast", codes, to=TensorProto.INT32), axis=0)
    grouped = b.op("Reshape", table, b.ints(0, -1, 32))
    return b.op("Reshape", b.op("Mul", grouped, b.op("Unsqueeze", scales, b.ints(2))), b.ints(0, -1))


def matmul(b: Builder, x: str, weight: str, out: str = "") -> str:
    """x [B, T, k] times weight [n, k] transposed."""
    return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]), out=out)


def unpack_q8(b: Builder, codes: str, scales: str, lead: tuple[int, ...]) -> str:
    """codes int8 [..., k], scales fp32 [..., k/32] -> fp32 [..., k]; `lead` is a 0 for each leading axis."""
    grouped = b.op("Reshape", b.op("Cast", codes, to=TensorProto.FLOAT), b.ints(*lead, -1, 32))
    scaled = b.op("Mul", grouped, b.op("Unsqueeze", scales, b.ints(-1)))
    return b.op("Reshape", scaled, b.ints(*lead, -1))


def causal_conv(b: Builder, d_conv: int, x: str, past: str, weight: str, bias: str, present: str) -> str:
    """silu(convolution over time): x [B, T, C], past [B, C, K-1], weight [C, 1, K], bias [C] -> [B, T, C]; K = d_conv."""
    keep = d_conv - 1
    window = b.op("Concat", b.op("Transpose", past, perm=[0, 2, 1]), x, axis=1)
    last = b.op("Slice", window, b.ints(-keep), b.ints(FOREVER), b.ints(1))
    b.op("Transpose", last, perm=[0, 2, 1], out=present)
    taps = b.op("Transpose", weight, perm=[2, 1, 0])  # [K, 1, C]
    total = bias
    for tap in range(d_conv):
        end = tap - keep if tap < keep else FOREVER
        part = b.op("Slice", window, b.ints(tap), b.ints(end), b.ints(1))
        total = b.op("Add", total, b.op("Mul", part, b.op("Gather", taps, b.const(np.array(tap)), axis=0)))
    return silu(b, total)
