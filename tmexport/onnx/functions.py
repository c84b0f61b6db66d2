"""Our operators: each a model-local function, so that any conforming runtime can run the file (domain `tmexport`, version 1).

    TernaryMatMul(x [B,T,k], codes uint8 [n,k/4], scales fp32 [n,k/g]; group_size, profile) -> [B,T,n]
    SelectiveScan(projected [B,T,d_in_proj], past_conv, past_ssm, conv_weight, conv_bias, dt_bias, a, d, norm_weight,
                  epsilon; profile) -> y [B,T,d_inner], present_conv, present_ssm
    RMSNorm(x [B,T,k], weight [k], epsilon; profile) -> [B,T,k]
    GatedScan(the same without norm_weight and epsilon; profile) -> the same, y without a norm
    CausalAttention(q [B,T,H*D], keys, values [B,G,S,D], scale; profile) -> y [B,T,H*D]: query t of T sees S - T + t + 1 positions
    SwiGLU(gate, up [B,T,k]; profile) -> silu(gate) * up
    Q4MatMul(x [B,T,k], codes uint8 [n,k/2], scales fp32 [n,k/32]; profile) -> [B,T,n]
    Q8MatMul(x [B,T,k], codes int8 [n,k], scales fp32 [n,k/32]; profile) -> [B,T,n]
    DenseMatMul(x [B,T,k], weight fp32 [n,k]; profile) -> [B,T,n]

The bodies compute in plain fp32. With `register_kernels` the same nodes run runtime_ref's kernels, whose every bit is
specified (docs/numerics.md); `profile` says which arithmetic that is. The dimensions are those of the model: a body is
written for one model, the operators are not.
"""

from __future__ import annotations

import onnx
from onnx import helper

from tmexport.model import Model
from tmexport.onnx import mathematics as m
from tmexport.onnx.builder import Builder
from tmexport.onnx.forms import OPERATORS, head_operator
from tmexport.onnx.names import DOMAIN, ModelInfo, projection_roles


def function_protos(info: ModelInfo, of_branches: list[onnx.FunctionProto], opset: int) -> list[onnx.FunctionProto]:
    """The functions that a model needs, those that its branches alone use among them."""
    head = head_operator(info.embedding_type)
    stored = [info.weights.get(role) for role in projection_roles(info.config)]
    operators = {OPERATORS[form.kind] if form else "DenseMatMul" for form in stored} - {head}
    products = [_PRODUCTS[name](name, opset) for name in _PRODUCTS if name in operators]
    return [*products, *of_branches, _rms_norm(info.config, opset), _PRODUCTS[head](head, opset)]


def _ternary_matmul(name: str, opset: int) -> onnx.FunctionProto:
    b = Builder(in_function=True)
    size = helper.make_node("Constant", [], ["group_size"])
    size.attribute.append(_reference("value_int", "group_size", onnx.AttributeProto.INT))
    b.nodes.append(size)
    shape = b.op("Concat", b.ints(0, -1), b.op("Unsqueeze", "group_size", b.ints(0)), axis=0)
    m.matmul(b, "x", m.unpack_ternary(b, "codes", "scales", shape), out="y")
    return function(name, ("x", "codes", "scales"), ("y",), b, opset, ("group_size", "profile"))


def _rms_norm(model: Model, opset: int) -> onnx.FunctionProto:
    b = Builder(in_function=True)
    m.rms_norm(b, "x", "weight", "epsilon", model.d_model, out="y")
    return function("RMSNorm", ("x", "weight", "epsilon"), ("y",), b, opset, ("profile",))


def _blocks_matmul(name: str, opset: int) -> onnx.FunctionProto:
    b = Builder(in_function=True)
    dense = m.unpack_q8(b, "codes", "scales", (0,)) if name == "Q8MatMul" else m.unpack_int4(b, "codes", "scales")
    m.matmul(b, "x", dense, out="y")
    return function(name, ("x", "codes", "scales"), ("y",), b, opset, ("profile",))


def _dense_matmul(name: str, opset: int) -> onnx.FunctionProto:
    b = Builder(in_function=True)
    m.matmul(b, "x", "weight", out="y")
    return function(name, ("x", "weight"), ("y",), b, opset, ("profile",))


_PRODUCTS = {
    "TernaryMatMul": _ternary_matmul,
    "Q4MatMul": _blocks_matmul,
    "Q8MatMul": _blocks_matmul,
    "DenseMatMul": _dense_matmul,
}


def function(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], b: Builder, opset: int, attributes: tuple[str, ...]
) -> onnx.FunctionProto:
    """A function of our domain with this body."""
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, name, list(inputs), list(outputs), b.nodes, opsets, attributes=list(attributes))


def _reference(name: str, referred: str, kind: onnx.AttributeProto.AttributeType) -> onnx.AttributeProto:
    attribute = onnx.AttributeProto(name=name, ref_attr_name=referred)
    attribute.type = kind
    return attribute
