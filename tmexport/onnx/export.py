"""`tmexport onnx`: the file, and beside it a tokenizer and a configuration for programs that are not ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmexport.files import atomic_write
from tmexport.onnx.builder import Initializer
from tmexport.onnx.graph import Graph
from tmexport.onnx.names import config_path, model_states, tokenizer_path
from tmexport.onnx.writer import write_model


@dataclass(frozen=True)
class Exported:
    """What was written: bytes of the model (with its data file, if it has one), and all files."""

    n_bytes: int
    files: list[Path]


def export_onnx(
    path: Path,
    graph: Graph,
    tokenizer: str | None,
    on_tensor: Callable[[Initializer], None] = lambda tensor: None,
    ids_only: bool = False,
    more: Mapping[Path, str] | None = None,
) -> Exported:
    """Write the model, and beside it its configuration and its tokenizer; each complete or not at all.

    Args:
        path: of the model.
        graph: what to write.
        tokenizer: the text of a tokenizer.json, as `export_tokenizer` made it; None: none is written.
        on_tensor: called after each tensor.
        ids_only: say in the configuration that the tokenizer was left out on purpose.
        more: texts to write beside it, by path.

    Raises:
        TmexportError: a weight cannot be represented, or a file cannot be written.
    """
    sizes = write_model(path, graph, on_tensor)
    files = list(sizes)
    config = describe(graph) | ({"tokenizer": False} if ids_only else {})
    texts = {config_path(path): json.dumps(config, indent=2) + "\n"}
    if tokenizer is not None:
        texts[tokenizer_path(path)] = tokenizer
    for name, text in {**texts, **(more or {})}.items():
        with atomic_write(name) as file:
            file.write(text.encode())
        files.append(name)
    return Exported(sum(sizes.values()), files)


def describe(graph: Graph) -> dict[str, Any]:
    """The configuration written beside the file: dimensions, and every input and output with its shape."""
    info = graph.info
    state = [
        {"input": s.past, "output": s.present, "shape": s.dims("past"), "dtype": "float32", "initial": 0.0}
        for s in model_states(info.config, info.io_names)
    ]
    return {
        "form": info.form,
        "group_size": info.group_size,
        "embedding_type": info.embedding_type,
        "opset": {o.domain or "ai.onnx": o.version for o in graph.skeleton.opset_import},
        "ir_version": graph.skeleton.ir_version,
        "input_ids": {"shape": ["batch", "time"], "dtype": "int64"},
        "logits": {
            "shape": ["batch", "time" if info.logits == "all" else 1, info.config.vocab_size],
            "dtype": "float32",
        },
        "state": state,
        "model": info.config.to_hf(),
    }
