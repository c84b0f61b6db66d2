"""What a measurement was made with, so that a model card can say it and nobody takes the numbers for another model's."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tmexport import __version__
from tmexport.errors import TmexportError

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.onnx")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex.

    Raises:
        TmexportError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TmexportError(f"{path}: cannot be read: {error.strerror or error}") from None


def model_digests(path: Path) -> dict[str, str]:
    """The SHA-256 of a model file, or of each file of weights in a folder, by name."""
    files = sorted(f for pattern in WEIGHTS for f in path.glob(pattern) if f.is_file()) if path.is_dir() else [path]
    return {file.name: file_digest(file) for file in files}


def made_with(command: Sequence[object], model: Path, texts: Sequence[Path] = ()) -> dict[str, Any]:
    """For the JSON object that a measuring command prints: the command (files by their names alone, for it is to be
    published), the version, and the SHA-256 of the model's and the texts' files.
    """
    words = [word.name if isinstance(word, Path) else str(word) for word in command]
    digests = {path.name: file_digest(path) for path in texts}
    return {
        "command": shlex.join(words), "tmexport": __version__, "model_sha256": model_digests(model), "text_sha256": digests,
    }  # fmt: skip
