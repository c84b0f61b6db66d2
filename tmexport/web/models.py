"""What of a model goes into a page: a GGUF for the page's own kernels where they can run it, else an ONNX file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tmexport.checkpoint import Checkpoint
from tmexport.errors import NotTernaryError, UsageError
from tmexport.extras import import_with
from tmexport.files import atomic_write
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import GROUP_SIZE_KEY, TOKENIZER_JSON_KEY, config_from_metadata
from tmexport.gguf.reader import GGUFFile
from tmexport.model import Model
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.tokenizer.gguf import ExportedTokenizer, export_tokenizer, stop_ids, vocabulary_as_json
from tmexport.types import GGMLType

LARGEST_PACKED = 3_500_000_000  # bytes; WebAssembly addresses 4 GB, and the state wants its part
VALUES = {GGMLType.F32, GGMLType.F16, GGMLType.Q8_0}
CODES = {GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.Q2_0}


@dataclass(frozen=True)
class PageModel:
    """engine: "packed" (page/packed.mjs) or "onnx" (page/onnx.mjs); name: of the model's file; tokenizer: a tokenizer.json's text;
    stop: the tokens that end a text; write: puts the file, and what belongs to it, in a folder, and tells what it wrote.
    """

    engine: str
    name: str
    tokenizer: str
    stop: tuple[int, ...]
    write: Callable[[Path], list[Path]]


def from_gguf(gguf: GGUFFile, tokenizer: Path | None = None) -> PageModel:
    """A GGUF as it is; tokenizer: a tokenizer.json to take in place of its own.

    Raises:
        UsageError: the page's kernels do not run it.
        TmexportError: it is damaged, or has no tokenizer.
    """
    model = config_from_metadata(gguf)
    kinds = {name: info.type for name, info in gguf.tensors.items()}
    obstacle = why_not_packed(model, kinds, gguf.data.size)
    if obstacle is None and CODES & set(kinds.values()) and GROUP_SIZE_KEY not in gguf.metadata:
        obstacle = f"has no {GROUP_SIZE_KEY}"
    if obstacle:
        raise UsageError(
            f"{gguf.path}: {obstacle}; a page runs such a model as ONNX: give the checkpoint's folder instead"
        )
    text, metadata = gguf.metadata.get(TOKENIZER_JSON_KEY), gguf.metadata
    if tokenizer is not None:
        given = export_tokenizer(tokenizer, model)
        text, metadata = given.text, given.metadata
    if not isinstance(text, str):
        text = vocabulary_as_json(metadata, str(gguf.path))

    def write(folder: Path) -> list[Path]:
        with open(gguf.path, "rb") as source, atomic_write(folder / "model.gguf") as file:
            shutil.copyfileobj(source, file)
        return [folder / "model.gguf"]

    return PageModel("packed", "model.gguf", text, stop_ids(metadata), write)


def from_checkpoint(checkpoint: Checkpoint, embedding: str, tokenizer: Path | None = None) -> PageModel:
    """A checkpoint, exported; embedding: q8_0 or f16; tokenizer: a tokenizer.json to take in place of its own.

    Raises:
        UsageError: it has no tokenizer, or is too large for a page.
        TmexportError: it is not low-bit, or its tokenizer cannot be said in files.
    """
    source = tokenizer or checkpoint.tokenizer
    if source is None:
        raise UsageError(f"{checkpoint.path}: has no tokenizer.json; a page needs one to read what is typed: name one with --tokenizer")  # fmt: skip
    exported = export_tokenizer(source, checkpoint.config, checkpoint.path)
    return _packed(checkpoint, embedding, exported) or _onnx(checkpoint, embedding, exported)


def why_not_packed(model: Model, kinds: Mapping[str, GGMLType], n_bytes: int) -> str | None:
    """What keeps the page's kernels from running a file of these tensors, or None."""
    if model.family != "mamba2":
        return f"is a {model.family}"
    branch = model.blocks[0].branches[0]
    assert isinstance(branch, Mamba2)
    if branch.d_state % 4 or branch.d_inner % 32 or model.d_model % 32:
        return f"has states of {branch.d_state} and rows of {model.d_model} and {branch.d_inner}"
    for name, kind in kinds.items():
        if kind not in (VALUES | CODES if name.startswith("blk.") else VALUES):
            return f"{name} is {kind.name}"
    if n_bytes > LARGEST_PACKED:
        return f"takes {n_bytes / 1e9:.1f} GB, more than a page can hold ({LARGEST_PACKED / 1e9} GB)"
    return None


def _packed(checkpoint: Checkpoint, embedding: str, tokenizer: ExportedTokenizer) -> PageModel | None:
    if checkpoint.config.family != "mamba2":
        return None
    try:
        plan = plan_export(checkpoint, embedding=embedding)
    except NotTernaryError:
        return None  # what is wrong with it, the ONNX export says
    if why_not_packed(checkpoint.config, {t.name: t.kind for t in plan.tensors}, plan.n_bytes):
        return None

    def write(folder: Path) -> list[Path]:
        plan.write(folder / "model.gguf", lambda tensor: None)
        return [folder / "model.gguf"]

    return PageModel("packed", "model.gguf", tokenizer.text, stop_ids(tokenizer.metadata), write)


def _onnx(checkpoint: Checkpoint, embedding: str, tokenizer: ExportedTokenizer) -> PageModel:
    exporting, building = import_with("onnx", "tmexport.onnx.export"), import_with("onnx", "tmexport.onnx.graph")
    largest = import_with("onnx", "tmexport.onnx.writer").LARGEST_FILE
    graph = building.build_graph(checkpoint, "portable", {"q8_0": "q8"}.get(embedding, embedding), logits="last")
    n_bytes = sum(tensor.n_bytes for tensor in graph.initializers)
    if n_bytes > largest:  # and unpacked to fp32 it would be several times that
        raise UsageError(f"the model would take {n_bytes / 1e9:.1f} GB, more than a page can hold (2 GB); use a smaller one, or --embedding-type q8_0")  # fmt: skip

    def write(folder: Path) -> list[Path]:
        written: list[Path] = exporting.export_onnx(folder / "model.onnx", graph, tokenizer.text).files
        return written

    return PageModel("onnx", "model.onnx", tokenizer.text, stop_ids(tokenizer.metadata), write)
