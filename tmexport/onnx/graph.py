"""The whole graph: inputs, layers, outputs; everything but the weights' bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

import tmexport
from tmexport.checkpoint import Checkpoint
from tmexport.errors import UsageError
from tmexport.model import Model
from tmexport.onnx import weights as w
from tmexport.onnx.branches import MODULES, branch_module
from tmexport.onnx.builder import Builder, Initializer
from tmexport.onnx.forms import Custom, Ort, Portable, head_operator
from tmexport.onnx.functions import function_protos
from tmexport.onnx.names import DOMAIN, DOMAIN_VERSION, MICROSOFT, ModelInfo, block_states

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
) -> Graph:
    """Decide everything about the file; weights are read only as far as is needed to know their group size.

    Args:
        checkpoint: whose projections are exactly ternary.
        form: one of names.FORMS.
        embedding_type: one of names.EMBEDDING_TYPES, for the embedding and an untied head.
        opset: of ai.onnx; None is the oldest that works.
        io_names: one of names.IO_NAMES.
        logits: "all", or "last" for those of the last position only, [batch, 1, vocab].

    Raises:
        NotTernaryError: a projection is not exactly ternary.
        UsageError: the opset cannot be.
    """
    config = checkpoint.config
    _check_branches(config)
    opset = _checked_opset(form, opset)
    group_size = w.projections_group_size(checkpoint)
    info = ModelInfo(config, form, group_size, embedding_type, io_names, logits)
    initializers = _weights(checkpoint, info)

    b = Builder()
    writer = _WRITERS[form](b, config, group_size)
    embedding, final_norm, head = (
        name for name, _ in (config.names.embedding, config.names.final_norm, config.names.head)
    )
    layers = [_initializer_names(config, number) for number in range(config.n_layer)]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "time"])]
    outputs = [_float("logits", ["batch", "time" if logits == "all" else 1, config.vocab_size])]
    hidden = writer.embed("input_ids", embedding, embedding_type)
    b.annotate(hidden, ("batch", "time", config.d_model))
    normed = writer.norm(hidden, layers[0]["norm"])
    for number, block in enumerate(config.blocks):
        b.scope = f"layers.{number}."
        states = block_states(block, number, io_names)
        inputs += [_float(state.past, ["batch", *state.shape]) for state in states.values()]
        outputs += [_float(state.present, ["batch", *state.shape]) for state in states.values()]
        (branch,) = block.branches
        out = branch_module(branch.kind).WRITERS[form](writer, branch, normed, layers[number], states)
        if number + 1 < config.n_layer:
            hidden, normed = writer.add_norm(hidden, out, layers[number + 1]["norm"])
        elif logits == "last":
            last = b.op("Add", hidden, out)
            last = b.op("Slice", last, b.ints(-1), b.ints(np.iinfo(np.int64).max), b.ints(1))
            normed = writer.norm(last, final_norm)
        else:
            hidden, normed = writer.add_norm(hidden, out, final_norm)
    b.scope = ""
    writer.head(normed, embedding if config.tie_embeddings else head, embedding_type)

    skeleton = _model(b, info, opset, inputs, outputs)
    return Graph(skeleton, initializers + b.constants, info)


def _check_branches(config: Model) -> None:
    """Raises UsageError for what no form writes: branches without a module, several in a block, multipliers."""
    kinds = [branch.kind for block in config.blocks for branch in block.branches]
    unknown = next((kind for kind in kinds if kind not in MODULES), None)
    if unknown is not None:
        raise UsageError(
            f"the model has {unknown} layers, which ONNX has not yet; expected {' or '.join(MODULES)} alone; use `tmexport gguf`"
        )
    if any(len(block.branches) != 1 or block.multiplier != 1.0 for block in config.blocks):
        raise UsageError("the model has several branches in a block, or multipliers, which ONNX has not yet")


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
        if name in info.config.projections:
            ternary = w.ternary_nbits if info.form == "ort" else w.ternary_plain
            tensors += ternary(checkpoint, name, shape, info.group_size)
        elif not tensor.low_bit:
            tensors.append(w.small(checkpoint, tensor))
        elif info.embedding_type != "q8":
            tensors += w.embedding_dense(checkpoint, name, shape, w.F16 if info.embedding_type == "f16" else w.F32)
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
        functions = function_protos(info.config, head_operator(info.embedding_type), opset)
        branches = {branch.kind: branch for block in info.config.blocks for branch in block.branches}
        functions[1:1] = [f for kind, branch in branches.items() for f in branch_module(kind).functions(branch, opset)]
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
