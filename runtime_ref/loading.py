"""A GGUF or an ONNX file as `generate` needs it: a model, its tokenizer, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime_ref.sampling import Sampling
from runtime_ref.tokenizer import Tokenizer
from tmexport.errors import TokenizerError, UsageError
from tmexport.extras import import_with


class Runs(Protocol):
    """What `Model` and `OrtModel` have in common."""

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling | None = None,
        state: Any = None,
        stop: Sequence[int] = (),
        on_logits: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[int]: ...

    def new_state(self) -> Any: ...


@dataclass(frozen=True)
class Loaded:
    """tokenizer: None if the file has none and none is needed; about: what --json says of how it ran."""

    model: Runs
    tokenizer: Tokenizer | None
    stop: tuple[int, ...]
    about: dict[str, Any]

    def encode(self, prompt: str | list[int]) -> list[int]:
        """The prompt's token ids, at least one.

        Raises:
            UsageError: it has none.
        """
        ids = prompt if isinstance(prompt, list) else self.tokenizer.prompt(prompt) if self.tokenizer else []
        if not ids:
            raise UsageError("the prompt has no tokens; give at least one character")
        return ids


def load_gguf(path: Path, profile: str, threads: int | None, given: Path | None, need_text: bool) -> Loaded:
    """A file for the runtime's own kernels; `need_text`: the prompt is text, so there must be a tokenizer.

    Raises:
        TmexportError: the file is damaged, or has no tokenizer and needs one.
    """
    from runtime_ref.model import Model
    from tmexport.gguf.reader import open_gguf
    from tmexport.tokenizer.gguf import stop_ids

    file = open_gguf(path)
    tokenizer = _tokenizer(lambda: Tokenizer.from_gguf(file, given), need_text or given is not None)
    model = Model.load(path, profile, threads)
    return Loaded(model, tokenizer, stop_ids(file.metadata), {"profile": profile, "threads": model.threads})


def load_onnx(path: Path, kernels: bool, threads: int | None, given: Path | None, need_text: bool) -> Loaded:
    """A file for onnxruntime; its tokenizer is MODEL.tokenizer.json beside it, or `given`.

    Raises:
        UsageError: there is no such file, or onnxruntime is not installed.
        TmexportError: it cannot be loaded, or there is no tokenizer and it needs one.
    """
    from tmexport.onnx.names import tokenizer_path
    from tmexport.tokenizer.names import end_tokens

    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected a file written by `tmexport onnx`")
    where = given or tokenizer_path(path)
    tokenizer = _tokenizer(lambda: Tokenizer.from_json(where), need_text or given is not None)
    model = import_with("onnx", "runtime_ref.ort.model").OrtModel.load(path, threads, kernels)
    stop = end_tokens(tokenizer.vocabulary() if tokenizer else {}, model.config.eos_token_id)
    return Loaded(model, tokenizer, stop, {"form": model.info.form, "kernels": kernels})


def _tokenizer(load: Callable[[], Tokenizer], needed: bool) -> Tokenizer | None:
    try:
        return load()
    except TokenizerError as error:
        if not needed:
            return None
        raise TokenizerError(f"{error}; name one with --tokenizer, or give the prompt as --tokens 1,2,3") from None
