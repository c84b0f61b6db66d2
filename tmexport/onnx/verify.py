"""Compare a checkpoint with the ONNX file that was exported from it.

The weights are read back by code that shares nothing with the writer's packing; the nodes must be, byte for byte, those
that this release, or an earlier one, writes for the model, so that a right weight in a wrong place cannot pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx

from tmexport.checkpoint import Checkpoint
from tmexport.errors import NotTernaryError
from tmexport.onnx.graph import Graph, build_graph
from tmexport.onnx.names import ModelInfo, OnnxError, config_path, info_from_metadata, projection_roles, tokenizer_path
from tmexport.onnx.verify_weights import compare_codes, compare_small, compare_values, stored_array
from tmexport.tokenizer.gguf import export_tokenizer
from tmexport.verify import Difference, Report

_NOT_COMPARED = {"chunk_size", "bos_token_id", "eos_token_id"}  # of training code, and of the tokenizer


def load_onnx(path: Path) -> tuple[onnx.ModelProto, ModelInfo]:
    """A file written by `tmexport onnx`, parsed whole.

    Raises:
        OnnxError: there is no such file, it is damaged, or another program wrote it.
    """
    if not path.is_file():  # a pipe would never end
        raise OnnxError(f"{path}: no such file; expected a file written by `tmexport onnx`")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public base; OSError
        raise OnnxError(f"{path}: is not a readable ONNX file: {' '.join(str(error).split())}") from None
    return model, info_from_metadata({p.key: p.value for p in model.metadata_props}, path)


def verify_onnx(
    checkpoint: Checkpoint,
    path: Path,
    on_tensor: Callable[[str], None] = lambda name: None,
    tokenizer: Path | None = None,
) -> Report:
    """Compare the dimensions, the nodes, every weight and the tokenizer beside the file; stops at the first difference.

    The arguments are those of `tmexport.verify.verify_gguf`.

    Raises:
        OnnxError: the file is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    model, info = load_onnx(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    difference = _compare_config(checkpoint, info) or _compare_graph(checkpoint, path, model, info, stored)
    n_ternary = n_codes = n_scales = n_other = 0
    for name, tensor in checkpoint.config.tensors.items() if difference is None else ():
        if tensor.role in info.weights:
            difference, codes, scales = compare_codes(checkpoint, path, stored, info, name)
            n_ternary, n_codes, n_scales = n_ternary + 1, n_codes + codes, n_scales + scales
        elif tensor.low_bit:
            difference = compare_values(checkpoint, path, stored, info, tensor)
            n_other += 1
        else:
            difference = compare_small(checkpoint, path, stored, tensor)
            n_other += 1
        if difference is not None:
            break
        on_tensor(name)
    return Report(n_ternary, n_codes, n_scales, n_other, difference or _compare_tokenizer(checkpoint, path, tokenizer))


def _compare_config(checkpoint: Checkpoint, info: ModelInfo) -> Difference | None:
    expected, found = checkpoint.config.dimensions(), info.config.dimensions()
    for field in (name for name in expected | found if name not in _NOT_COMPARED):
        if expected.get(field) != found.get(field):
            return Difference(field, None, None, repr(expected.get(field)), repr(found.get(field)))
    return None


def _compare_graph(
    checkpoint: Checkpoint, path: Path, model: onnx.ModelProto, info: ModelInfo, stored: dict[str, onnx.TensorProto]
) -> Difference | None:
    """The first difference from the graph that this release writes, unless it is the one that an earlier release wrote."""
    opset = next((o.version for o in model.opset_import if not o.domain), 0)
    dense = set(info.weights).isdisjoint(projection_roles(info.config))
    projections = info.dense_type if dense else "auto"
    how = (info.form, info.embedding_type, opset, info.io_names, info.logits, projections)
    try:
        difference = _graph_difference(build_graph(checkpoint, *how), path, model, info, stored)
        if difference is not None and difference.tensor.startswith("graph "):
            older = _graph_difference(build_graph(checkpoint, *how, older=True), path, model, info, stored)
            return difference if older is not None and older.tensor.startswith("graph ") else older
    except NotTernaryError as error:
        return Difference("checkpoint", None, None, "exactly ternary projections", str(error))
    return difference


def _graph_difference(
    graph: Graph, path: Path, model: onnx.ModelProto, info: ModelInfo, stored: dict[str, onnx.TensorProto]
) -> Difference | None:
    if info.group_size != graph.info.group_size:
        return Difference("group_size", None, None, str(graph.info.group_size), str(info.group_size))
    if info.weights != graph.info.weights:
        return Difference("weights", None, None, str(dict(graph.info.weights)), str(dict(info.weights)))
    expected = graph.skeleton
    for what in ("node", "input", "output", "value_info"):
        want, have = getattr(expected.graph, what), getattr(model.graph, what)
        for index, (one, other) in enumerate(zip(want, have, strict=False)):
            if one != other:
                return Difference(f"graph {what} {index}", None, None, _short(one), _short(other))
        if len(want) != len(have):
            return Difference(f"graph {what}s", None, None, str(len(want)), str(len(have)))
    if expected.ir_version != model.ir_version:
        return Difference("ir_version", None, None, str(expected.ir_version), str(model.ir_version))
    if list(expected.functions) != list(model.functions):
        return Difference("functions", None, None, "those this release writes", "others")
    if {(o.domain, o.version) for o in expected.opset_import} != {(o.domain, o.version) for o in model.opset_import}:
        return Difference("opset_import", None, None, str(expected.opset_import), str(model.opset_import))
    for tensor in graph.initializers:
        if tensor.name not in stored:
            return Difference(tensor.name, None, None, f"{tensor.dtype} {list(tensor.shape)}", "nothing")
        dims = list(stored[tensor.name].dims)
        if dims != list(tensor.shape):  # numpy would read a dimension of -1 as "whatever is left"
            return Difference(tensor.name, None, None, f"the shape {list(tensor.shape)}", f"{dims}")
        if tensor.name.startswith("const_"):  # the table of codes, zero points, axes, epsilon
            want, have = tensor.make(), stored_array(stored[tensor.name], path)
            if want.dtype != have.dtype or want.shape != have.shape or want.tobytes() != have.tobytes():
                return Difference(tensor.name, None, None, f"{want.dtype} {list(want.shape)}", "another constant")
    extra = set(stored) - {tensor.name for tensor in graph.initializers}
    return Difference(min(extra), None, None, "no such weight", "one") if extra else None


def _compare_tokenizer(checkpoint: Checkpoint, path: Path, tokenizer: Path | None) -> Difference | None:
    """The tokenizer asked for, or else the checkpoint's, if it has one, is the one beside the file."""
    source = tokenizer or checkpoint.tokenizer
    if source is None:
        return None
    beside, want = tokenizer_path(path), f"the text of {source}"
    expected = export_tokenizer(source, checkpoint.config, checkpoint.path).text
    if tokenizer is None and not beside.exists() and _written_without_tokenizer(path):
        return None
    if not beside.is_file():
        return Difference("tokenizer", None, None, f"{want} in {beside.name}", "no such file")
    try:
        if beside.read_bytes() == expected.encode():
            return None
    except OSError as error:
        raise OnnxError(f"{beside}: cannot be read: {error.strerror}") from None
    return Difference("tokenizer", None, None, want, f"another in {beside.name}")


def _short(proto: object) -> str:
    try:
        text = str(proto)
    except UnicodeDecodeError:  # protobuf before 5 does not show a damaged string
        text = repr(getattr(proto, "SerializeToString", bytes)())
    return " ".join(text.split())[:120]


def _written_without_tokenizer(path: Path) -> bool:
    """What `--no-tokenizer` leaves in the configuration beside the file."""
    try:
        return json.loads(config_path(path).read_text(encoding="utf-8")).get("tokenizer") is False
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
