"""The mathematics as nodes of standard ONNX operators (ai.onnx 15 and later), shared by the portable and the custom form.

Names: b is the Builder; every other string is the name of a tensor. Shapes: B batch, T time, H heads, P headdim,
N d_state, G n_groups, R = H / G heads a group, K d_conv, C channels of the convolution.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tmexport.config import Mamba2Config
from tmexport.onnx.builder import Builder

CHUNK = 64  # positions a chunk of the scan: its work grows with the chunk, its memory with T / chunk
_FOREVER = np.iinfo(np.int64).max
_MINUS_INFINITY = -1e30  # its exponential is 0; unlike the real one it never meets inf - inf

# byte -> its four codes as fp32, lowest bits first (the checkpoint's packing)
CODE_TABLE = np.stack([(np.arange(256) >> shift & 3).astype(np.float32) - 1 for shift in (0, 2, 4, 6)], axis=1)


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


def matmul(b: Builder, x: str, weight: str, out: str = "") -> str:
    """x [B, T, k] times weight [n, k] transposed."""
    return b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]), out=out)


def unpack_q8(b: Builder, codes: str, scales: str, lead: tuple[int, ...]) -> str:
    """codes int8 [..., k], scales fp32 [..., k/32] -> fp32 [..., k]; `lead` is a 0 for each leading axis."""
    grouped = b.op("Reshape", b.op("Cast", codes, to=TensorProto.FLOAT), b.ints(*lead, -1, 32))
    scaled = b.op("Mul", grouped, b.op("Unsqueeze", scales, b.ints(-1)))
    return b.op("Reshape", scaled, b.ints(*lead, -1))


def causal_conv(b: Builder, c: Mamba2Config, xbc: str, past: str, weight: str, bias: str, present: str) -> str:
    """silu(convolution over time): xbc [B, T, C], past [B, C, K-1], weight [C, 1, K], bias [C] -> [B, T, C]."""
    keep = c.d_conv - 1
    window = b.op("Concat", b.op("Transpose", past, perm=[0, 2, 1]), xbc, axis=1)
    last = b.op("Slice", window, b.ints(-keep), b.ints(_FOREVER), b.ints(1))
    b.op("Transpose", last, perm=[0, 2, 1], out=present)
    taps = b.op("Transpose", weight, perm=[2, 1, 0])  # [K, 1, C]
    total = bias
    for tap in range(c.d_conv):
        end = tap - keep if tap < keep else _FOREVER
        part = b.op("Slice", window, b.ints(tap), b.ints(end), b.ints(1))
        total = b.op("Add", total, b.op("Mul", part, b.op("Gather", taps, b.const(np.array(tap)), axis=0)))
    return silu(b, total)


def selective_scan(
    b: Builder,
    c: Mamba2Config,
    projected: str,
    past_conv: str,
    past_ssm: str,
    conv_weight: str,
    conv_bias: str,
    dt_bias: str,
    a: str,
    d: str,
    norm_weight: str,
    eps: str,
    outputs: tuple[str, str, str],
) -> None:
    """Everything of a mixer between its two projections, without a loop (arXiv 2405.21060, section 6, listing 1).

    projected [B, T, d_in_proj] (z, x, B, C, dt), past_conv [B, C, K-1], past_ssm [B, H, N, P] -> the three `outputs`:
    gated and normalised y [B, T, d_inner], present_conv, present_ssm. Time is cut into chunks of min(T, 64) positions,
    padded with steps that change nothing (dt = 0); a chunk is a product of matrices, and so are the steps between chunks.
    """
    y_out, present_conv, present_ssm = outputs
    groups, per_group, bc = c.n_groups, c.n_heads // c.n_groups, c.n_groups * c.d_state
    z, xbc, dt = b.ops(
        "Split", projected, b.ints(c.d_inner, c.conv_dim, c.n_heads), outputs=3, axis=-1
    )  # opset 13's form
    xbc = causal_conv(b, c, xbc, past_conv, conv_weight, conv_bias, present_conv)
    dt = b.op("Softplus", b.op("Add", dt, dt_bias))

    time = b.op("Gather", b.op("Shape", projected), b.ints(1), axis=0)  # int64 [1]
    one = b.ints(1)
    chunk = b.op("Min", time, b.ints(CHUNK))
    chunks = b.op("Div", b.op("Sub", b.op("Add", time, chunk), one), chunk)
    padding = b.op("Sub", b.op("Mul", chunks, chunk), time)
    pads = b.op("Concat", b.ints(0, 0, 0, 0), padding, b.ints(0), axis=0)
    xbc, dt = b.op("Pad", xbc, pads), b.op("Pad", dt, pads)

    def chunked(tensor: str, *tail: int) -> str:
        """[B, chunks * chunk, ...] -> [B, chunks, chunk, *tail]."""
        return b.op("Reshape", tensor, b.op("Concat", b.ints(0), chunks, chunk, b.ints(*tail), axis=0))

    x, bb, cc = b.ops("Split", xbc, b.ints(c.d_inner, bc, bc), outputs=3, axis=-1)
    x = chunked(x, groups, per_group, c.headdim)
    dt = chunked(dt, groups, per_group, 1)
    bb, cc = (chunked(t, groups, 1, c.d_state) for t in (bb, cc))
    by_head = b.ints(groups, per_group, 1)
    order = [0, 3, 4, 1, 2, 5]  # [B, chunks, chunk, G, R, .] <-> [B, G, R, chunks, chunk, .]
    dx = b.op("Transpose", b.op("Mul", x, dt), perm=order)
    log_decay = b.op("Transpose", b.op("Mul", dt, b.op("Reshape", a, by_head)), perm=order)
    bt, ct = b.op("Transpose", bb, perm=[0, 3, 4, 1, 5, 2]), b.op("Transpose", cc, perm=order)

    # inside a chunk: position t sees s <= t through exp(sum of log_decay over s+1..t)
    total = b.op("CumSum", log_decay, b.const(np.array(4)))  # [B, G, R, chunks, chunk, 1]
    weights = _causal_decay(b, total, b.op("Transpose", total, perm=[0, 1, 2, 3, 5, 4]), chunk)
    inside = b.op("MatMul", b.op("Mul", b.op("MatMul", ct, bt), weights), dx)

    # what a chunk adds to the state, and the state at the start of every chunk
    end = b.op("Slice", total, b.ints(-1), b.ints(_FOREVER), b.ints(4))  # [B, G, R, chunks, 1, 1]
    added = b.op("MatMul", bt, b.op("Mul", dx, b.op("Exp", b.op("Sub", end, total))))
    first = b.op("Reshape", past_ssm, b.ints(0, groups, per_group, 1, c.d_state, c.headdim))
    flat = b.op("Reshape", b.op("Concat", first, added, axis=3), b.ints(0, 0, 0, 0, -1))
    ends = b.op("Pad", b.op("Reshape", end, b.ints(0, 0, 0, -1)), b.ints(0, 0, 0, 1, 0, 0, 0, 0))
    ends = b.op("CumSum", ends, b.const(np.array(3)))  # [B, G, R, chunks + 1]
    rows, columns = (b.op("Unsqueeze", ends, b.ints(axis)) for axis in (4, 3))
    states = b.op("MatMul", _causal_decay(b, rows, columns, b.op("Add", chunks, one)), flat)
    starts = b.op("Slice", states, b.ints(0), b.ints(-1), b.ints(3))
    starts = b.op("Reshape", starts, b.ints(0, 0, 0, 0, c.d_state, c.headdim))
    final = b.op("Slice", states, b.ints(-1), b.ints(_FOREVER), b.ints(3))
    b.op("Reshape", final, b.ints(0, c.n_heads, c.d_state, c.headdim), out=present_ssm)

    y = b.op("Add", inside, b.op("Mul", b.op("MatMul", ct, starts), b.op("Exp", total)))
    y = b.op("Add", b.op("Transpose", y, perm=order), b.op("Mul", x, b.op("Reshape", d, by_head)))
    y = b.op("Slice", b.op("Reshape", y, b.ints(0, -1, c.d_inner)), b.ints(0), time, one)
    gated_norm(b, c, y, z, norm_weight, eps, y_out)


def _causal_decay(b: Builder, rows: str, columns: str, size: str) -> str:
    """exp(rows - columns) where the row's index is at least the column's, else 0; `size` is int64 [1]."""
    index = b.op("Range", b.const(np.array(0)), b.op("Squeeze", size), b.const(np.array(1)))
    past = b.op("GreaterOrEqual", b.op("Unsqueeze", index, b.ints(1)), b.op("Unsqueeze", index, b.ints(0)))
    return b.op("Exp", b.op("Where", past, b.op("Sub", rows, columns), b.scalar(_MINUS_INFINITY)))


def gated_norm(b: Builder, c: Mamba2Config, y: str, z: str, weight: str, eps: str, out: str) -> None:
    """rms_norm(y * silu(z)) over each of n_groups equal parts (mamba_ssm's definition), [B, T, d_inner]."""
    gated = b.op("Mul", y, silu(b, z))
    if c.n_groups == 1:
        rms_norm(b, gated, weight, eps, c.d_inner, out)
        return
    size = c.d_inner // c.n_groups
    parts = b.op("Reshape", gated, b.ints(0, 0, c.n_groups, size))
    normed = rms_norm(b, parts, b.op("Reshape", weight, b.ints(c.n_groups, size)), eps, size)
    b.op("Reshape", normed, b.ints(0, 0, c.d_inner), out=out)
