"""The Mamba-2 mixer as ONNX nodes: portable (written out), custom (our operator SelectiveScan) and ort (contributed operators).

Shapes: B batch, T time, H heads, P headdim, N d_state, G n_groups, R = H / G heads a group, K d_conv, C channels of the
convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx

from tmexport.errors import UsageError
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.onnx.builder import Builder
from tmexport.onnx.forms import PROFILE, Custom, Ort, Portable
from tmexport.onnx.functions import function
from tmexport.onnx.mathematics import FOREVER, causal_conv, rms_norm, silu
from tmexport.onnx.names import DOMAIN, MICROSOFT, GraphState

CHUNK = 64  # positions a chunk of the scan: its work grows with the chunk, its memory with T / chunk
_MINUS_INFINITY = -1e30  # its exponential is 0; unlike the real one it never meets inf - inf
_VECTORS = (
    "conv_weight",
    "conv_bias",
    "dt_bias",
    "a",
    "d",
    "gate_norm",
)  # roles, in the order of SelectiveScan's inputs

SCAN_INPUTS = (
    "projected",
    "past_conv",
    "past_ssm",
    "conv_weight",
    "conv_bias",
    "dt_bias",
    "a",
    "d",
    "norm_weight",
    "epsilon",
)
SCAN_OUTPUTS = ("y", "present_conv", "present_ssm")


def portable(form: Portable, c: Mamba2, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The branch of normalised x [B, T, d_model]; writes the present states. weights: initialisers by role."""
    projected, b = form.product(x, weights["in_proj"]), form.b
    outputs = (b.name("y"), state["conv"].present, state["ssm"].present)
    selective_scan(b, c, _scan_inputs(form, projected, weights, state), outputs)
    b.annotate(outputs[0], ("batch", "time", c.d_inner))
    return form.product(_turned(b, c, outputs[0]), weights["out_proj"])


def _turned(b: Builder, c: Mamba2, y: str) -> str:
    """y [B, T, d_inner] times the branch's Hadamard matrix, as two: H of size i * j is H of i, times H of j (Kronecker)."""
    if not c.online_hadamard:
        return y
    low = 1 << c.online_hadamard.bit_length() // 2
    high = c.online_hadamard // low
    parts = b.op("Reshape", y, b.ints(0, 0, -1, high, low))
    parts = b.op("MatMul", b.const(_hadamard(high)), b.op("MatMul", parts, b.const(_hadamard(low))))
    return b.op("Reshape", parts, b.ints(0, 0, c.d_inner), dims=("batch", "time", c.d_inner))


def _hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix, orthonormal, fp32: 1 where the numbers of row and column share an even number of bits."""
    both = np.arange(size)[:, None] & np.arange(size)
    signs = [[-1.0 if int(bits).bit_count() % 2 else 1.0 for bits in row] for row in both]
    return (np.array(signs) / np.sqrt(size)).astype(np.float32)


def custom(form: Custom, c: Mamba2, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The same with one node for everything between the projections.

    Raises:
        UsageError: out_proj's inputs are turned, for which our domain has no operator.
    """
    if c.online_hadamard:
        raise UsageError(
            "--ops custom has no operator for the online Hadamard matrix, to the bit; use --ops portable or ort"
        )
    projected = form.product(x, weights["in_proj"])
    outputs = (form.b.name(SCAN_OUTPUTS[0]), state["conv"].present, state["ssm"].present)
    inputs = _scan_inputs(form, projected, weights, state)
    y = form.b.ops(_operator(c), *inputs, outputs=outputs, domain=DOMAIN, profile=PROFILE)[0]
    return form.product(y, weights["out_proj"])


def _scan_inputs(
    form: Portable, projected: str, weights: Mapping[str, str], state: Mapping[str, GraphState]
) -> tuple[str, ...]:
    past = (projected, state["conv"].past, state["ssm"].past)
    vectors = (*past, *(weights[role] for role in _VECTORS if role in weights))
    return (*vectors, form.epsilon) if "gate_norm" in weights else vectors


def _operator(c: Mamba2) -> str:
    """The custom form's; without a norm it takes neither weight nor epsilon."""
    return "SelectiveScan" if c.gate_norm else "GatedScan"


def ort(
    form: Ort, c: Mamba2, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState], older: bool = False
) -> str:
    """The same with onnxruntime's CausalConvWithState and LinearAttention.

    older: as files before 25 November 2026 have it, with two nodes more.
    """
    b, heads, bc = form.b, c.n_heads, c.n_groups * c.d_state
    # With dt_bias added: the product has a bias, and a token costs by the node. onnxruntime pads it once, at load.
    bias = "" if older else b.op("Pad", weights["dt_bias"], b.ints(c.d_in_proj - heads, 0))
    projected = form.product(x, weights["in_proj"], bias)
    z, xbc, dt = b.ops("Split", projected, b.ints(c.d_inner, c.conv_dim, heads), outputs=3, axis=-1)
    xbc = b.op("Transpose", xbc, perm=[0, 2, 1])
    inputs = [xbc, weights["conv_weight"], weights["conv_bias"], state["conv"].past]
    outputs = (b.name("conv"), state["conv"].present)
    b.ops("CausalConvWithState", *inputs, outputs=outputs, domain=MICROSOFT, activation="silu")
    b.annotate(outputs[0], ("batch", c.conv_dim, "time"))
    xbc = b.op("Transpose", outputs[0], perm=[0, 2, 1])
    x, bb, cc = b.ops("Split", xbc, b.ints(c.d_inner, bc, bc), outputs=3, axis=-1)
    dt = b.op("Softplus", b.op("Add", dt, weights["dt_bias"]) if older else dt)
    by_head = b.op("Reshape", x, b.ints(0, 0, heads, c.headdim))
    dx = b.op("Reshape", b.op("Mul", by_head, b.op("Unsqueeze", dt, b.ints(3))), b.ints(0, 0, c.d_inner))
    # query C, key B (one a group), value dt * x, decay dt * A: the recurrence of Mamba-2
    inputs = [cc, bb, dx, state["ssm"].past, b.op("Mul", dt, weights["a"])]
    outputs = (b.name("scan"), state["ssm"].present)
    attributes = {"q_num_heads": c.n_groups, "kv_num_heads": heads, "scale": 1.0, "update_rule": "gated"}
    b.ops("LinearAttention", *inputs, outputs=outputs, domain=MICROSOFT, **attributes)
    b.annotate(outputs[0], ("batch", "time", c.d_inner))
    d = b.op("Unsqueeze", weights["d"], b.ints(1))
    if older:
        skip = b.op("Reshape", b.op("Mul", by_head, d), b.ints(0, 0, c.d_inner))
    else:  # D is spread out at load
        skip = b.op("Mul", x, b.op("Reshape", b.op("Expand", d, b.ints(heads, c.headdim)), b.ints(c.d_inner)))
    y = b.op("Add", outputs[0], skip)
    gated = b.op("Mul", y, silu(b, z))
    if not c.gate_norm:
        return form.product(_turned(b, c, gated), weights["out_proj"])
    if c.n_groups == 1:
        return form.product(_turned(b, c, form.norm(gated, weights["gate_norm"])), weights["out_proj"])
    parts = b.op("Reshape", gated, b.ints(0, 0, c.n_groups, -1))
    normed = form.norm(parts, b.const(np.ones(c.d_inner // c.n_groups, np.float32)))
    y = b.op("Mul", b.op("Reshape", normed, b.ints(0, 0, c.d_inner)), weights["gate_norm"])
    return form.product(_turned(b, c, y), weights["out_proj"])


WRITERS = {"portable": portable, "custom": custom, "ort": ort}
OLDER_WRITERS = {
    "ort": partial(ort, older=True)
}  # what an earlier release wrote, where that is not what this one writes


def functions(c: Mamba2, opset: int) -> list[onnx.FunctionProto]:
    """The bodies of the custom form's operators that this branch alone uses."""
    b = Builder(in_function=True)
    inputs = SCAN_INPUTS if c.gate_norm else SCAN_INPUTS[:-2]
    selective_scan(b, c, inputs, SCAN_OUTPUTS)
    return [function(_operator(c), inputs, SCAN_OUTPUTS, b, opset, ("profile",))]


def selective_scan(
    b: Builder,
    c: Mamba2,
    inputs: Sequence[str],
    outputs: tuple[str, str, str],
) -> None:
    """Everything of a mixer between its two projections, without a loop (arXiv 2405.21060, section 6, listing 1).

    projected [B, T, d_in_proj] (z, x, B, C, dt), past_conv [B, C, K-1], past_ssm [B, H, N, P] -> the three `outputs`:
    gated and normalised y [B, T, d_inner], present_conv, present_ssm. `inputs` stand in the order of SCAN_INPUTS, whose last two
    belong to the norm. Time is cut into chunks of min(T, 64) positions,
    padded with steps that change nothing (dt = 0); a chunk is a product of matrices, and so are the steps between chunks.
    """
    projected, past_conv, past_ssm, conv_weight, conv_bias, dt_bias, a, d, *norm = inputs
    y_out, present_conv, present_ssm = outputs
    groups, per_group, bc = c.n_groups, c.n_heads // c.n_groups, c.n_groups * c.d_state
    z, xbc, dt = b.ops(
        "Split", projected, b.ints(c.d_inner, c.conv_dim, c.n_heads), outputs=3, axis=-1
    )  # opset 13's form
    xbc = causal_conv(b, c.d_conv, xbc, past_conv, conv_weight, conv_bias, present_conv)
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
    end = b.op("Slice", total, b.ints(-1), b.ints(FOREVER), b.ints(4))  # [B, G, R, chunks, 1, 1]
    added = b.op("MatMul", bt, b.op("Mul", dx, b.op("Exp", b.op("Sub", end, total))))
    first = b.op("Reshape", past_ssm, b.ints(0, groups, per_group, 1, c.d_state, c.headdim))
    flat = b.op("Reshape", b.op("Concat", first, added, axis=3), b.ints(0, 0, 0, 0, -1))
    ends = b.op("Pad", b.op("Reshape", end, b.ints(0, 0, 0, -1)), b.ints(0, 0, 0, 1, 0, 0, 0, 0))
    ends = b.op("CumSum", ends, b.const(np.array(3)))  # [B, G, R, chunks + 1]
    rows, columns = (b.op("Unsqueeze", ends, b.ints(axis)) for axis in (4, 3))
    states = b.op("MatMul", _causal_decay(b, rows, columns, b.op("Add", chunks, one)), flat)
    starts = b.op("Slice", states, b.ints(0), b.ints(-1), b.ints(3))
    starts = b.op("Reshape", starts, b.ints(0, 0, 0, 0, c.d_state, c.headdim))
    final = b.op("Slice", states, b.ints(-1), b.ints(FOREVER), b.ints(3))
    b.op("Reshape", final, b.ints(0, c.n_heads, c.d_state, c.headdim), out=present_ssm)

    y = b.op("Add", inside, b.op("Mul", b.op("MatMul", ct, starts), b.op("Exp", total)))
    y = b.op("Add", b.op("Transpose", y, perm=order), b.op("Mul", x, b.op("Reshape", d, by_head)))
    y = b.op("Slice", b.op("Reshape", y, b.ints(0, -1, c.d_inner)), b.ints(0), time, one)
    if norm:
        gated_norm(b, c, y, z, norm[0], norm[1], y_out)
    else:
        b.op("Mul", y, silu(b, z), out=y_out)


def _causal_decay(b: Builder, rows: str, columns: str, size: str) -> str:
    """exp(rows - columns) where the row's index is at least the column's, else 0; `size` is int64 [1]."""
    index = b.op("Range", b.const(np.array(0)), b.op("Squeeze", size), b.const(np.array(1)))
    past = b.op("GreaterOrEqual", b.op("Unsqueeze", index, b.ints(1)), b.op("Unsqueeze", index, b.ints(0)))
    return b.op("Exp", b.op("Where", past, b.op("Sub", rows, columns), b.scalar(_MINUS_INFINITY)))


def gated_norm(b: Builder, c: Mamba2, y: str, z: str, weight: str, eps: str, out: str) -> None:
    """rms_norm(y * silu(z)) over each of n_groups equal parts (mamba_ssm's definition), [B, T, d_inner]."""
    gated = b.op("Mul", y, silu(b, z))
    if c.n_groups == 1:
        rms_norm(b, gated, weight, eps, c.d_inner, out)
        return
    size = c.d_inner // c.n_groups
    parts = b.op("Reshape", gated, b.ints(0, 0, c.n_groups, size))
    normed = rms_norm(b, parts, b.op("Reshape", weight, b.ints(c.n_groups, size)), eps, size)
    b.op("Reshape", normed, b.ints(0, 0, c.d_inner), out=out)
