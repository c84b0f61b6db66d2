"""`tmexport web`: a folder that runs a model in a browser. Everything it needs is in it; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import io
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from tmexport.checkpoint import Checkpoint
from tmexport.errors import TmexportError, UsageError
from tmexport.files import atomic_write
from tmexport.onnx import writer
from tmexport.onnx.export import export_onnx
from tmexport.onnx.graph import build_graph
from tmexport.tokenizer.gguf import export_tokenizer

# package, version that was tested, its files, and what they are called in vendor/
PACKAGES = (
    ("onnxruntime-web", "1.30.0", ("dist/ort.wasm.min.mjs", "dist/ort-wasm-simd-threaded.mjs", "dist/ort-wasm-simd-threaded.wasm")),
    ("@huggingface/tokenizers", "0.2.0", ("dist/tokenizers.min.mjs", "LICENSE")),
)  # fmt: skip
_PAGE = ("style.css", "app.mjs", "index.html")
_RENAMED = {("@huggingface/tokenizers", "LICENSE"): "tokenizers.LICENSE"}


def write_site(
    checkpoint: Checkpoint,
    folder: Path,
    runtime: Path | None = None,
    embedding_type: str = "q8",
    title: str | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Write the page, the model (portable form) and the runtime; index.html comes last.

    Args:
        checkpoint: ternary, with a tokenizer.
        folder: made if it is not there.
        runtime: a node_modules folder with onnxruntime-web and @huggingface/tokenizers; None asks npm for them.
        embedding_type: as for build_graph.
        title: of the page; None is the checkpoint's folder name.
        on_file: called after each file.

    Returns:
        The files by name, with their sizes in bytes.

    Raises:
        UsageError: the checkpoint has no tokenizer, the model is too large, or npm is needed and not installed.
        TmexportError: a file of the runtime is missing, or the folder cannot be written.
    """
    if checkpoint.tokenizer is None:
        raise UsageError(f"{checkpoint.path}: has no tokenizer.json; a page needs one to read what is typed")
    codec = export_tokenizer(checkpoint.tokenizer, checkpoint.config, checkpoint.path)
    graph = build_graph(checkpoint, "portable", embedding_type, logits="last")
    n_bytes = sum(tensor.n_bytes for tensor in graph.initializers)
    if n_bytes > writer.LARGEST_FILE:  # and unpacked to fp32 it would be several times that
        raise UsageError(f"the model would take {n_bytes / 1e9:.1f} GB, more than a page can hold (2 GB); use a smaller one, or --embedding-type q8")  # fmt: skip
    vendor = _from_folder(runtime) if runtime else _from_npm()
    try:
        (folder / "vendor").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TmexportError(f"{folder}: cannot be made: {error.strerror}") from None
    sizes: dict[str, int] = {}

    def write(name: str, data: bytes) -> None:
        with atomic_write(folder / name) as file:
            file.write(data)
        sizes[name] = len(data)
        on_file()

    for name, data in vendor.items():
        write(f"vendor/{name}", data)
    for path in export_onnx(folder / "model.onnx", graph, codec.text).files:
        sizes[path.name] = path.stat().st_size
        on_file()
    shown = html.escape(title or checkpoint.path.resolve().name)
    for name in _PAGE:
        text = resources.files("tmexport.onnx").joinpath("web", name).read_text(encoding="utf-8")
        write(name, text.replace("{{title}}", shown).replace("{{prompt}}", "").encode())
    return sizes


def _from_folder(node_modules: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for package, _, names in PACKAGES:
        for name in names:
            path = node_modules / package / name
            try:
                found[_vendor_name(package, name)] = path.read_bytes()
            except OSError as error:
                raise TmexportError(f"{path}: cannot be read: {error.strerror}; expected a node_modules folder with onnxruntime-web and @huggingface/tokenizers") from None  # fmt: skip
    return found


def _from_npm() -> dict[str, bytes]:
    """The packages as the registry has them, unpacked in memory; no script of theirs runs."""
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError("npm is not installed; install it, or give a node_modules folder with --runtime")
    found: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for package, version, names in PACKAGES:
            command = [npm, "pack", f"{package}@{version}", "--pack-destination", scratch, "--silent"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                reason = " ".join(result.stderr.split())[-200:]
                raise TmexportError(f"npm cannot fetch {package} {version}: {reason}; give a node_modules folder with --runtime")  # fmt: skip
            archive = Path(scratch) / result.stdout.split()[-1]
            members = _members(archive.read_bytes(), names)
            if len(members) != len(names):
                missing = min(set(names) - set(members))
                raise TmexportError(f"{package} {version}: holds no {missing}; give a node_modules folder with --runtime")  # fmt: skip
            found |= {_vendor_name(package, name): data for name, data in members.items()}
    return found


def _members(archive: bytes, names: tuple[str, ...]) -> Mapping[str, bytes]:
    """The wanted files of an npm package (all under package/)."""
    wanted, found = {f"package/{name}": name for name in names}, {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar:
            if member.name in wanted and member.isfile():
                found[wanted[member.name]] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


def _vendor_name(package: str, name: str) -> str:
    return _RENAMED.get((package, name), Path(name).name)
