"""`tmexport web`: a folder that runs a model in a browser. Everything it needs is in it; nothing is loaded from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from tmexport.errors import TmexportError
from tmexport.evidence import file_digest
from tmexport.files import atomic_write
from tmexport.web.models import PageModel
from tmexport.web.vendor import ONNXRUNTIME, TOKENIZERS, vendor_files

_PAGE = ("style.css", "app.mjs", "download.mjs", "storage.mjs", "worker.js")
_ENGINES = {
    "packed": (("packed.mjs", "layout.mjs", "gguf.mjs", "kernels.wasm"), (TOKENIZERS,)),
    "onnx": (("onnx.mjs",), (ONNXRUNTIME, TOKENIZERS)),
}


def write_site(
    model: PageModel,
    folder: Path,
    title: str,
    runtime: Path | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Write the page, the model and what runs it; index.html comes last.

    Args:
        model: of `from_gguf` or `from_checkpoint`.
        folder: made if it is not there.
        title: of the page.
        runtime: a node_modules folder with the packages that the model's engine takes; None asks npm for them.
        on_file: called after each file.

    Returns:
        The files by name, with their sizes in bytes.

    Raises:
        UsageError: npm is needed and not installed.
        TmexportError: a file of the runtime is missing, or the folder cannot be written.
    """
    own, packages = _ENGINES[model.engine]
    vendor = vendor_files(packages, runtime)
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

    for path in model.write(folder):
        sizes[path.name] = path.stat().st_size
        on_file()
    write("model.tokenizer.json", model.tokenizer.encode())
    for name, data in vendor.items():
        write(f"vendor/{name}", data)
    for name in (*_PAGE, *own):
        write(name, _page_file(name))
    page = {
        "engine": model.engine,
        "model": model.name,
        "sha256": file_digest(folder / model.name),
        "bytes": sizes[model.name],
        "stop": model.stop,
        "files": sorted(set(sizes) - {model.name}),
    }
    write("page.json", json.dumps(page, indent=1).encode())
    shown = html.escape(title)
    write("index.html", _page_file("index.html").replace(b"{{title}}", shown.encode()).replace(b"{{prompt}}", b""))
    return sizes


def _page_file(name: str) -> bytes:
    return resources.files("tmexport.web").joinpath("page", name).read_bytes()
