"""Causal attention as ONNX nodes: portable (written out), custom (our operator CausalAttention), ort (Attention, RotaryEmbedding).

Shapes: B batch, T time, P positions before, S = P + T, H heads of queries, G of keys and values, R = H / G, D head_dim. Biases,
RoPE and the growing keys and values are standard operators in every form. The angles' sines and cosines are those of
`tmexport.model.rope`, products in fp64 of two tables' rows, so that they are the same bits as in runtime_ref.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from tmexport.model.branches.attention import Attention
from tmexport.model.rope import NEAR, context_limit, rope_tables
from tmexport.onnx.builder import Builder
from tmexport.onnx.forms import PROFILE, Custom, Ort, Portable
from tmexport.onnx.functions import function
from tmexport.onnx.names import DOMAIN, GraphState

_MINUS_INFINITY = -1e30  # its exponential is 0
_INPUTS = ("q", "keys", "values", "scale")


def portable(form: Portable, c: Attention, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The branch of normalised x [B, T, d_model]; writes the present keys and values. weights: initialisers by role."""
    b = form.b
    q, keys, values = _turned(form, c, x, weights, state)
    (mask,) = form.once("mask", lambda: (_mask(b, *_lengths(b, "input_ids", state)),))
    y = attend(b, c, q, keys, values, b.scalar(c.scale), mask)
    return form.product(y, weights["o_proj"], weights.get("o_bias", ""))


def custom(form: Custom, c: Attention, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The same with one node for everything between the turned queries and the output's product."""
    q, keys, values = _turned(form, c, x, weights, state)
    scale = form.b.scalar(c.scale)  # a tensor: an attribute would reach a Python kernel as six decimal digits
    y = form.b.op("CausalAttention", q, keys, values, scale, domain=DOMAIN, profile=PROFILE)
    return form.product(y, weights["o_proj"], weights.get("o_bias", ""))


def ort(form: Ort, c: Attention, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The same with ai.onnx 23's RotaryEmbedding and Attention, which joins the past with the present.

    GroupQueryAttention (com.microsoft) gives the same numbers, and is slower at decode; it refuses a batch that has a past.
    """
    b = form.b
    q, k, v = _projected(form, c, x, weights)
    if c.rope_theta is not None:
        cos, sin = form.once(f"angles {c}", lambda: _batched(b, *_angles(form, c, state)))
        q, k = (
            b.op("RotaryEmbedding", y, cos, sin, num_heads=heads) for y, heads in ((q, c.n_heads), (k, c.n_kv_heads))
        )
    inputs = (q, k, v, "", state["k"].past, state["v"].past)
    outputs = (b.name("attended"), state["k"].present, state["v"].present)
    attributes: dict[str, Any] = {"q_num_heads": c.n_heads, "kv_num_heads": c.n_kv_heads, "scale": c.scale}
    b.ops("Attention", *inputs, outputs=outputs, is_causal=1, **attributes)
    return form.product(outputs[0], weights["o_proj"], weights.get("o_bias", ""))


WRITERS = {"portable": portable, "custom": custom, "ort": ort}


def functions(c: Attention, opset: int) -> list[onnx.FunctionProto]:
    """The body of the custom form's operator."""
    b = Builder(in_function=True)
    time, positions = (b.op("Gather", b.op("Shape", x), b.ints(axis), axis=0) for x, axis in (("q", 1), ("keys", 2)))
    mask = _mask(b, b.op("Sub", positions, time), positions)
    attend(b, c, "q", "keys", "values", "scale", mask, out="y")
    return [function("CausalAttention", _INPUTS, ("y",), b, opset, ("profile",))]


def _projected(form: Portable, c: Attention, x: str, weights: Mapping[str, str]) -> tuple[str, ...]:
    """q [B, T, H * D], k and v [B, T, G * D], with their biases."""
    return tuple(form.product(x, weights[f"{n}_proj"], weights.get(f"{n}_bias", "")) for n in ("q", "k", "v"))


def _turned(
    form: Portable, c: Attention, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]
) -> tuple[str, str, str]:
    """q [B, T, H * D], and all keys and values [B, G, S, D], the queries and keys turned to their positions."""
    b = form.b
    q, k, v = _projected(form, c, x, weights)
    k, v = (b.op("Reshape", y, b.ints(0, 0, c.n_kv_heads, c.head_dim)) for y in (k, v))
    if c.rope_theta is not None:
        cos, sin = form.once(f"angles {c}", lambda: _angles(form, c, state))
        half, by_head = c.head_dim // 2, b.op("Reshape", q, b.ints(0, 0, c.n_heads, c.head_dim))
        q = b.op("Reshape", _turn(b, by_head, cos, sin, half), b.ints(0, 0, -1))
        k = _turn(b, k, cos, sin, half)
    joined = []
    for name, new in (("k", k), ("v", v)):
        new = b.op("Transpose", new, perm=[0, 2, 1, 3])
        joined.append(b.op("Concat", state[name].past, new, axis=2, out=state[name].present))
    return q, joined[0], joined[1]


def _lengths(b: Builder, ids: str, state: Mapping[str, GraphState]) -> tuple[str, str]:
    """P and S, int64 [1]."""
    past = b.op("Gather", b.op("Shape", state["k"].past), b.ints(2), axis=0)
    return past, b.op("Add", past, b.op("Gather", b.op("Shape", ids), b.ints(1), axis=0))


def _positions(b: Builder, start: str, end: str) -> str:
    """start, start + 1, ... end - 1, int64."""
    return b.op("Range", b.op("Squeeze", start), b.op("Squeeze", end), b.const(np.array(1)))


def _mask(b: Builder, past: str, end: str) -> str:
    """What is added to the scores of T queries, fp32 [T, S]: 0, and to those of later positions the negative of infinity."""
    queries, keys = _positions(b, past, end), _positions(b, b.ints(0), end)
    seen = b.op("LessOrEqual", b.op("Unsqueeze", keys, b.ints(0)), b.op("Unsqueeze", queries, b.ints(1)))
    return b.op("Where", seen, b.scalar(0.0), b.scalar(_MINUS_INFINITY))


def _angles(form: Portable, c: Attention, state: Mapping[str, GraphState]) -> tuple[str, str]:
    """cos and sin fp32 [T, D / 2] of the positions P to S - 1."""
    b, half = form.b, c.head_dim // 2
    assert c.rope_theta is not None
    far, near = rope_tables(c.rope_theta, c.head_dim, context_limit(form.model.context_length))
    at = _positions(b, *_lengths(b, "input_ids", state))
    block = b.op("Div", at, b.const(np.array(NEAR)))
    rest = b.op("Sub", at, b.op("Mul", block, b.const(np.array(NEAR))))
    parts = []
    for table, index in ((far, block), (near, rest)):
        row = b.op("Gather", b.const(table), index, axis=0)
        parts.append(b.ops("Split", row, b.ints(half, half), outputs=2, axis=-1))
    (far_cos, far_sin), (near_cos, near_sin) = parts
    cos = b.op("Sub", b.op("Mul", far_cos, near_cos), b.op("Mul", far_sin, near_sin))
    sin = b.op("Add", b.op("Mul", far_sin, near_cos), b.op("Mul", far_cos, near_sin))
    return b.op("Cast", cos, to=TensorProto.FLOAT), b.op("Cast", sin, to=TensorProto.FLOAT)


def _batched(b: Builder, cos: str, sin: str) -> tuple[str, str]:
    """[T, D / 2] -> [B, T, D / 2], which RotaryEmbedding asks for."""
    batch = b.op("Gather", b.op("Shape", "input_ids"), b.ints(0), axis=0)
    shape = b.op("Concat", batch, b.ints(1, 1), axis=0)
    return b.op("Expand", cos, shape), b.op("Expand", sin, shape)


def _turn(b: Builder, x: str, cos: str, sin: str, half: int) -> str:
    """RoPE of x [B, T, heads, D]: element i with i + half, D / 2."""
    cos, sin = b.op("Unsqueeze", cos, b.ints(1)), b.op("Unsqueeze", sin, b.ints(1))
    first, second = b.ops("Split", x, b.ints(half, half), outputs=2, axis=-1)
    one = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    other = b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin))
    return b.op("Concat", one, other, axis=-1)


def attend(b: Builder, c: Attention, q: str, keys: str, values: str, scale: str, mask: str, out: str = "") -> str:
    """q [B, T, H * D], keys and values [B, G, S, D], mask [T, S] -> [B, T, H * D].

    The R heads that share keys are more rows of one product.
    """
    groups, shared, width = c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim
    heads = b.op("Transpose", b.op("Reshape", q, b.ints(0, 0, groups, shared, width)), perm=[0, 2, 3, 1, 4])
    rows = b.op("Reshape", heads, b.ints(0, 0, -1, width))  # [B, G, R * T, D]
    scores = b.op("Mul", b.op("MatMul", rows, b.op("Transpose", keys, perm=[0, 1, 3, 2])), scale)
    by_head = b.op("Reshape", scores, b.op("Concat", b.ints(0, groups, shared), b.op("Shape", mask), axis=0))
    weights = b.op("Softmax", b.op("Add", by_head, mask), axis=-1)
    flat = b.op("Reshape", weights, b.op("Concat", b.ints(0, 0, -1), _last(b, mask), axis=0))
    summed = b.op("Reshape", b.op("MatMul", flat, values), b.ints(0, groups, shared, -1, width))
    return b.op(
        "Reshape", b.op("Transpose", summed, perm=[0, 3, 1, 2, 4]), b.ints(0, 0, groups * shared * width), out=out
    )


def _last(b: Builder, x: str) -> str:
    """The length of the last axis of a matrix, int64 [1]."""
    return b.op("Gather", b.op("Shape", x), b.ints(1), axis=0)
