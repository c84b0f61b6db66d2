"""The whole graph: inputs, layers, outputs; everything but the weights' bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

import tmexport
from tmexport.checkpoint import Checkpoint
from tmexport.errors import UsageError
from tmexport.model import Block, Branch, Model
from tmexport.onnx import weights as w
from tmexport.onnx.branches import branch_module
from tmexport.onnx.builder import Builder, Initializer
from tmexport.onnx.forms import Custom, Ort, Portable
from tmexport.onnx.functions import function_protos
from tmexport.onnx.names import DOMAIN, DOMAIN_VERSION, MICROSOFT, GraphState, ModelInfo, block_states, layer_of

_WRITERS = {"ort": Ort, "portable": Portable, "custom": Custom}


@dataclass(frozen=True)
class Graph:
    """A model without the bytes of its weights, and how to make them."""

    skeleton: onnx.ModelProto
    initializers: list[Initializer]
    info: ModelInfo


def build_graph(
    checkpoint: Checkpoint,
    form: str = "ort",
    embedding_type: str = "q8",
    opset: int | None = None,
    io_names: str = "tmexport",
    logits: str = "all",
    projections: str = "auto",
    older: bool = False,
) -> Graph:
    """Decide everything about the file; weights are read only as far as is needed to know their group size.

    Args:
        checkpoint: whose projections are codes, or exactly ternary.
        form: one of names.FORMS.
        embedding_type: one of names.EMBEDDING_TYPES, for the embedding and an untied head.
        opset: of ai.onnx; None is the oldest that works.
        io_names: one of names.IO_NAMES.
        logits: "all", or "last" for those of the last position only, [batch, 1, vocab].
        projections: "auto", their codes (and fp16 for those that are dense beside codes); or one of names.DENSE_TYPES for all.
        older: the nodes of earlier releases, which `verify` knows.

    Raises:
        NotTernaryError: a projection is not exactly ternary.
        UsageError: the opset cannot be.
    """
    config = checkpoint.config
    _check_branches(config)
    opset = _checked_opset(form, opset)
    weights = w.stored_forms(checkpoint, projections != "auto", embedding_type)
    dense_type = "f16" if projections == "auto" else projections
    info = ModelInfo(config, form, weights, embedding_type, io_names, logits, dense_type)
    initializers = _weights(checkpoint, info)

    b = Builder()
    writer = _WRITERS[form](b, info)
    embedding, final_norm, head = (
        name for name, _ in (config.names.embedding, config.names.final_norm, config.names.head)
    )
    layers = [_initializer_names(config, number) for number in range(config.n_layer)]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "time"])]
    outputs = [_float("logits", ["batch", "time" if logits == "all" else 1, config.vocab_size])]
    hidden = _scaled(b, writer.embed("input_ids", embedding, embedding_type), config.embedding_multiplier)
    b.annotate(hidden, ("batch", "time", config.d_model))
    normed = writer.norm(hidden, layers[0]["norm"])
    for number, block in enumerate(config.blocks):
        b.scope = f"layers.{number}."
        states = block_states(block, layer_of(config, number), io_names)
        inputs += [_float(state.past, state.dims("past")) for state in states.values()]
        outputs += [_float(state.present, state.dims("positions")) for state in states.values()]
        out = _scaled(b, _block(writer, form, block, normed, layers[number], states, older), block.multiplier)
        if number + 1 < config.n_layer:
            hidden, normed = writer.add_norm(hidden, out, layers[number + 1]["norm"])
        elif logits == "last":
            last = b.op("Add", hidden, out)
            last = b.op("Slice", last, b.ints(-1), b.ints(np.iinfo(np.int64).max), b.ints(1))
            normed = writer.norm(last, final_norm)
        else:
            hidden, normed = writer.add_norm(hidden, out, final_norm)
    b.scope = ""
    weight, divisor = embedding if config.tie_embeddings else head, config.logits_divisor
    if divisor == 1.0:
        writer.head(normed, weight, embedding_type, "logits")
    else:
        b.op("Div", writer.head(normed, weight, embedding_type, ""), b.scalar(divisor), out="logits")

    skeleton = _model(b, info, opset, inputs, outputs)
    return Graph(skeleton, initializers + b.constants, info)


def _block(
    writer: Portable,
    form: str,
    block: Block,
    normed: str,
    names: dict[str, str],
    states: dict[str, GraphState],
    older: bool,
) -> str:
    """The sum of a block's branches."""
    total = ""
    for branch in block.branches:
        module = branch_module(branch.kind)
        write = getattr(module, "OLDER_WRITERS", {}).get(form) if older else None
        out = (write or module.WRITERS[form])(writer, branch, normed, names, states)
        total = writer.b.op("Add", total, out) if total else out
    return total


def _scaled(b: Builder, x: str, multiplier: float) -> str:
    return x if multiplier == 1.0 else b.op("Mul", x, b.scalar(multiplier))


def _check_branches(config: Model) -> None:
    """Raises UsageError for what no form writes: branches without a module, two of a kind that differ (functions have one body)."""
    found: dict[str, Branch] = {}
    for branch in (branch for block in config.blocks for branch in block.branches):
        branch_module(branch.kind)
        if found.setdefault(branch.kind, branch) != branch:
            raise UsageError(
                f"the model has {branch.kind} layers of two shapes, which ONNX has not yet; use `tmexport gguf`"
            )


def _checked_opset(form: str, opset: int | None) -> int:
    oldest, newest = _WRITERS[form].opset, onnx.defs.onnx_opset_version()
    if opset is None:
        return oldest
    if not oldest <= opset <= newest:
        raise UsageError(f"--opset is {opset}; expected {oldest} to {newest} for --ops {form}")
    return opset


def _initializer_names(model: Model, number: int) -> dict[str, str]:
    """The initialisers of a block by role."""
    return {tensor.role: w.initializer_name(tensor) for tensor in model.tensors.values() if tensor.block == number}


def _weights(checkpoint: Checkpoint, info: ModelInfo) -> list[Initializer]:
    tensors: list[Initializer] = []
    for tensor in info.config.tensors.values():
        name, shape = tensor.hf, tensor.shape
        if not tensor.low_bit:
            tensors.append(w.small(checkpoint, tensor))
        elif (stored := info.weights.get(tensor.role)) is not None:
            tensors += (w.coded_nbits if info.form == "ort" else w.coded_plain)(checkpoint, name, shape, stored)
        elif tensor.block is not None or info.embedding_type != "q8":
            kind = info.dense_type if tensor.block is not None else info.embedding_type
            tensors += w.dense(checkpoint, name, shape, w.F16 if kind == "f16" else w.F32)
        else:
            tensors += (w.embedding_nbits if info.form == "ort" else w.embedding_q8_0)(checkpoint, name, shape)
    return tensors


def _model(b: Builder, info: ModelInfo, opset: int, inputs: list, outputs: list) -> onnx.ModelProto:
    named = {value.name for value in outputs}
    shapes = [value for name, value in b.shapes.items() if name not in named]
    graph = helper.make_graph(b.nodes, info.config.family, inputs, outputs, value_info=shapes)
    opsets = [helper.make_opsetid("", opset)]
    functions = []
    if info.form == "ort":
        opsets.append(helper.make_opsetid(MICROSOFT, 1))
    if info.form == "custom":
        opsets.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        branches = {branch.kind: branch for block in info.config.blocks for branch in block.branches}
        bodies = [f for kind, branch in branches.items() for f in branch_module(kind).functions(branch, opset)]
        functions = function_protos(info, bodies, opset)
    model = helper.make_model(
        graph,
        functions=functions,
        opset_imports=opsets,
        ir_version=_ir_version(opset),
        producer_name="tmexport",
        producer_version=tmexport.__version__,
    )
    helper.set_model_props(model, info.to_metadata())
    return model


def _ir_version(opset: int) -> int:
    """The IR version of the onnx release that brought the opset, and at least 8, which brought functions."""
    return max(8, helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))


def _float(name: str, dims: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
