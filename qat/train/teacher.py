"""What a teacher must be able to do. `qat.model.LanguageModel` does; so may a model of any other kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor

from tmexport.evidence import file_digest
from tmexport.gguf.importing import import_gguf


class Teacher(Protocol):
    """A language model that is imitated. Its blocks must be as many, and its stream as wide, as those that are aligned to it."""

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, width], on the device where it computes."""

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads: int64 [batch, time] -> [batch, time, width]."""

    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        """The residual stream [batch, time, width]: what enters the first block, then what leaves each."""

    def mixing(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of each block, what enters it, and the matrices fp32 [batch, heads, time, time] by which it mixes positions, or None.

        Asked only for the objective `orient`.
        """

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its tensors, by which it is told from another."""

    def to(self, device: torch.device) -> Any:
        """Move it, in place."""


def teacher_folder(path: Path, cache: Path) -> Path:
    """The checkpoint folder of a teacher: `path`, or what a llama GGUF holds, imported to `cache` once.

    Raises:
        TmexportError: the GGUF cannot be imported (`tmexport.gguf.importing`).
    """
    if path.suffix != ".gguf" or not path.is_file():
        return path
    folder = cache / f"teacher-{file_digest(path)[:16]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache, prefix=".importing-") as beside:
            made = Path(beside) / "teacher"
            import_gguf(path, made)
            made.rename(folder)
    return folder
