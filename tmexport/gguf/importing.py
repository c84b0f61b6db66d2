"""A llama GGUF as a checkpoint folder: what a teacher that is published as a GGUF alone comes in through."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tmexport.checkpoint import write_checkpoint
from tmexport.errors import GGUFError, TmexportError
from tmexport.gguf.names import TOKENIZER_JSON_KEY, config_from_metadata, in_halves
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.model import Model, ModelTensor
from tmexport.tokenizer.gguf import has_vocabulary, vocabulary_as_json
from tmexport.types import decode_values

_TEMPLATE_KEY = "tokenizer.chat_template"


def import_gguf(path: Path, folder: Path, on_tensor: Callable[[str, int], None] = lambda name, total: None) -> Model:
    """Write a checkpoint folder with the weights that a GGUF of the family llama multiplies out to, in fp32.

    Rows that RoPE turns come in transformers' order, the tokenizer and its chat template beside the weights.

    Raises:
        GGUFError: the file is damaged, or of another family.
        TokenizerError: its tokenizer cannot be said as a tokenizer.json.
        TmexportError: the folder cannot be written, or has something in it.
    """
    gguf = open_gguf(path)
    model = config_from_metadata(gguf)
    if model.family != "llama":
        raise GGUFError(
            f"{path}: is a {model.family}; expected a llama (A of a state-space model is not stored as it was)"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TmexportError(f"{folder}: is there already; name a folder that is not, or is empty")
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in model.tensors.items():
        tensors[name] = tensor_values(gguf, tensor)
        on_tensor(name, len(model.tensors))
    with tempfile.TemporaryDirectory() as beside:
        write_checkpoint(folder, model, tensors, _tokenizer(gguf, Path(beside)))
    return model


def tensor_values(gguf: GGUFFile, tensor: ModelTensor) -> np.ndarray:
    """The values of a tensor without a transform, fp32, in the checkpoint's shape and order of rows."""
    info = gguf.tensors[tensor.gguf]
    values = decode_values(gguf.blocks(tensor.gguf), info.type, info.shape[-1], tensor.gguf).reshape(tensor.shape)
    return values if tensor.rotated is None else in_halves(values, tensor.rotated)


def _tokenizer(gguf: GGUFFile, folder: Path) -> Path | None:
    """A tokenizer.json in `folder`, and the chat template beside it; None if the file has no tokenizer."""
    text = gguf.metadata.get(TOKENIZER_JSON_KEY)
    if not isinstance(text, str):
        if not has_vocabulary(gguf.metadata):
            return None
        text = vocabulary_as_json(gguf.metadata, str(gguf.path))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    template = gguf.metadata.get(_TEMPLATE_KEY)
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder / "tokenizer.json"
