"""The same texts tokenised by the tokenizers library and by llama.cpp (the package xllamacpp, if it is installed)."""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tmexport.documents import is_text
from tmexport.errors import TmexportError, UsageError
from tmexport.gguf.names import model_metadata
from tmexport.gguf.writer import PlannedTensor, write_gguf
from tmexport.model import mamba2_model
from tmexport.types import GGMLType

_WINDOW = 4  # tokens shown on either side of a difference
_SECONDS = 600


@dataclass(frozen=True)
class TokenDifference:
    """The first difference: which text (from 0), at which token, the text around it, and the tokens of both from there."""

    text: int
    position: int
    excerpt: str
    ours: list[int]
    theirs: list[int]

    def __str__(self) -> str:
        return (
            f"text {self.text + 1}, token {self.position + 1}, near {self.excerpt!r}: the tokenizer gives {self.ours}, "
            f"llama.cpp {self.theirs}"
        )


def read_texts(path: Path) -> list[str]:
    """A .jsonl file has one text in each line's "text"; any other file is one text.

    Raises:
        UsageError: it cannot be read, is not UTF-8, or a line has no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() != ".jsonl":
            return [text]
        texts = [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f'{path}: cannot be read as UTF-8 text, or as lines of {{"text": "..."}}: {error}') from None
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f'{path}: has a line whose "text" is no string')
    for number, text in enumerate(texts, 1):
        if not is_text(text):
            raise UsageError(f"{path}: text {number} has half of a surrogate pair, which is no character")
    return texts


def first_difference(
    texts: Iterable[str], ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]]
) -> TokenDifference | None:
    """Where two tokenisers first disagree; None if they never do."""
    for number, text in enumerate(texts):
        mine, other = ours(text), theirs(text)
        if mine == other:
            continue
        pairs = zip(mine, other, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other)))
        place = len(text) * at // max(1, len(mine))
        excerpt = text if len(text) <= 60 else text[max(0, place - 30) : place + 30]
        return TokenDifference(number, at, excerpt, mine[at : at + _WINDOW], other[at : at + _WINDOW])
    return None


class LlamaTokenizer:
    """llama.cpp's tokeniser of a GGUF's tokenizer.* keys, in this process.

    It runs on a file of its own with those keys and the smallest model that llama.cpp loads, so that the size of the model
    does not matter.

    Raises:
        TmexportError: xllamacpp is not installed, or llama.cpp does not load the keys.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise TmexportError("xllamacpp is not installed; comparing with llama.cpp needs it: pip install xllamacpp") from None  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="tmexport-")
        path = Path(self._folder.name) / "vocabulary.gguf"
        write_vocabulary(path, metadata)
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = params.n_batch = params.n_ubatch = 64
        params.n_parallel, params.warmup, params.verbosity = 1, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        try:
            self._server = xllamacpp.Server(params)
            self._ask(
                "/slots"
            )  # an answer from its queue: a server that ends before its queue runs waits for it for ever
        except Exception as error:
            self._server = None
            self._folder.cleanup()
            raise TmexportError(f"llama.cpp does not load the tokenizer: {error}") from None

    def __enter__(self) -> LlamaTokenizer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server = None
        self._folder.cleanup()

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids; special tokens in the text are parsed, as the tokenizers library does."""
        try:
            return self._ask("/tokenize", {"content": text, "add_special": add_special, "parse_special": True})[
                "tokens"
            ]
        except (OSError, ValueError, KeyError) as error:
            raise TmexportError(f"llama.cpp does not tokenise a text of {len(text)} characters: {error}") from None

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return json.load(answer)


def write_vocabulary(path: Path, metadata: Mapping[str, Any]) -> None:
    """A GGUF with the tokenizer.* keys of `metadata`, and a model of one layer whose weights are 0."""
    keys = {k: v for k, v in metadata.items() if k.startswith("tokenizer.") and k != "tokenizer.huggingface.json"}
    keys = {k: list(v) if hasattr(v, "__len__") and not isinstance(v, str) else v for k, v in keys.items()}
    rows = len(keys.get("tokenizer.ggml.tokens", ())) or 1
    model = mamba2_model(d_model=32, n_layer=1, vocab_size=rows, d_state=16, headdim=32)
    tensors = []
    for tensor in model.tensors.values():
        kind = GGMLType.F16 if tensor.low_bit else GGMLType.F32
        row = np.zeros(kind.row_bytes(tensor.gguf_shape[-1]), np.uint8)
        n = int(np.prod(tensor.gguf_shape[:-1], dtype=np.int64))
        tensors.append(
            PlannedTensor(tensor.gguf, tensor.gguf_shape, kind, partial(np.broadcast_to, row, (n, row.size)))
        )
    write_gguf(path, model_metadata(model, 1, "vocabulary", None) | keys, tensors)
