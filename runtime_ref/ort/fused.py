"""A graph of the custom form with one node for a whole ternary Mamba-2 block: norm, projections, what lies between them, the sum.

A node costs onnxruntime some 3 microseconds, which small models feel. The operator `MixerBlock` is nowhere but in sessions that OrtModel
makes; its arithmetic is that of the nodes which it replaces.

    MixerBlock(hidden [B,T,d], past_conv, past_ssm, in codes, in scales, conv_weight, conv_bias, dt_bias, a, d, out codes, out scales,
               norm_weight, epsilon, gate_norm_weight, epsilon; group_size, out_group_size, profile) -> hidden, present_conv, present_ssm
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tmexport.onnx.names import DOMAIN

OPERATOR = "MixerBlock"


def with_blocks(model: bytes) -> bytes:
    """The same graph, where every RMSNorm, TernaryMatMul, SelectiveScan, TernaryMatMul and Add of one block is one node."""
    import onnx

    proto = onnx.load_model_from_string(model)
    nodes = proto.graph.node
    readers = Counter(name for node in nodes for name in node.input)
    readers.update(value.name for value in proto.graph.output)
    made = {name: node for node in nodes for name in node.output}
    gone, blocks = set(), {}  # by their first output: a node need not have a name
    for node in nodes:
        chain = _chain(node, made, readers)
        if chain:
            gone |= {part.output[0] for part in chain}
            blocks[node.output[0]] = _block(*chain)
    kept = [
        blocks.get(node.output[0], node) for node in nodes if node.output[0] in blocks or node.output[0] not in gone
    ]
    del nodes[:]
    nodes.extend(kept)
    return proto.SerializeToString()


def _chain(total: Any, made: dict[str, Any], readers: Counter[str]) -> tuple[Any, ...]:
    """The nodes of the block that ends with this sum, in order; nothing if it ends none."""
    if total.op_type != "Add":
        return ()
    found, name = [total], total.input[1]
    for operator in ("TernaryMatMul", "SelectiveScan", "TernaryMatMul", "RMSNorm"):
        node = made.get(name)
        if node is None or node.op_type != operator or node.domain != DOMAIN or readers[name] != 1:
            return ()
        found.append(node)
        name = node.input[0]
    return tuple(reversed(found)) if name == total.input[0] else ()


def _block(norm: Any, into: Any, scan: Any, out: Any, total: Any) -> Any:
    from onnx import helper

    def of(node: Any, name: str) -> Any:
        return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)

    inputs = [
        norm.input[0],
        *scan.input[1:3],
        *into.input[1:],
        *scan.input[3:8],
        *out.input[1:],
        *norm.input[1:],
        *scan.input[8:],
    ]
    outputs = [total.output[0], *scan.output[1:]]
    sizes = {"group_size": of(into, "group_size"), "out_group_size": of(out, "group_size")}
    return helper.make_node(OPERATOR, inputs, outputs, total.name, domain=DOMAIN, profile=of(scan, "profile"), **sizes)
