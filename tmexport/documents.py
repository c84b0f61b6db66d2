"""The one definition of a score: what a document is, where it starts, and which of its tokens count. Two programs use it.

A .jsonl file has one document in each line's "text"; any other text file is one document. Every document starts from an
empty state with the end-of-text token before it, the state is carried through the whole document whatever its length, and
every token of the document is scored, an end-of-text marker inside its text too. (If the model has no end-of-text token,
the first token of a document is not scored.) bits_per_byte is the sum of the tokens' nats / ln 2 / the UTF-8 bytes of the
text, so it compares models with different tokenizers; perplexity is exp(nats / token).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from tmexport.background import in_background
from tmexport.errors import TextError, TmexportError

END_OF_TEXT = "<|endoftext|>"
_AT_ONCE = 64  # documents that are tokenised together


@dataclass(frozen=True)
class Document:
    """ids: int64 [n], the token it starts with included; n_bytes of its UTF-8 text."""

    ids: np.ndarray
    n_bytes: int

    @property
    def scored(self) -> int:
        """Tokens that are predicted: all but the first."""
        return max(0, len(self.ids) - 1)


@dataclass(frozen=True)
class Score:
    """tokens: how many were scored; nats: their sum; text_bytes: of the text they stand for."""

    tokens: int
    nats: float
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.nats / self.tokens))

    def as_dict(self) -> dict[str, float]:
        """For --json."""
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


def read_text(path: Path, largest: int | None = None) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        TextError: it is missing or not UTF-8, or has more than `largest` bytes.
    """
    try:
        with path.open("rb") as file:
            return decoded(str(path), file.read() if largest is None else file.read(largest + 1), largest)
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from None


def decoded(name: str, data: bytes, largest: int | None) -> str:
    """UTF-8 as text: without a byte order mark, line breaks of any system.

    Raises:
        TextError: more than `largest` bytes, or not UTF-8.
    """
    if largest is not None and len(data) > largest:
        raise TextError(f"{name}: is longer than {largest} bytes; expected a prompt")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{name}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    return io.StringIO(text, newline=None).read()


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a text file.

    Raises:
        TextError: it cannot be read, or a line of a .jsonl file has no string "text".
    """
    if path.suffix.lower() != ".jsonl":
        yield read_text(path)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text_of_line(path, number, line)
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from None


def start_token(named: int | None, token_id: Callable[[str], int | None]) -> int | None:
    """The token before every document: the model's own end-of-text token, else the tokenizer's <|endoftext|>, else none."""
    return token_id(END_OF_TEXT) if named is None else named


def encode_documents(
    texts: Iterable[str],
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]],
    start: int | None,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> Iterator[Document]:
    """Every document that is not empty, tokenised once, some at a time; Ctrl-C is heard meanwhile."""
    rest = (text for text in texts if text)
    while batch := list(islice(rest, _AT_ONCE)):
        before = [] if start is None else [start]
        for text, ids in zip(batch, in_background(partial(encode, batch)), strict=True):
            size = len(text.encode())
            yield Document(np.array([*before, *ids], np.int64), size)
            on_bytes(size)


def score_documents(documents: Iterable[Document], nats_of: Callable[[np.ndarray], float]) -> Score:
    """Add up; `nats_of(ids)` gives the nats of ids[1:], each given everything before it, from an empty state.

    Raises:
        TextError: there is no token to score.
        TmexportError: the scores are no numbers.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    for document in documents:
        if document.scored:
            nats += nats_of(document.ids)
            tokens += document.scored
            text_bytes += document.n_bytes
    if not tokens:
        raise TextError("the text holds no token to score")
    if not math.isfinite(nats):
        raise TmexportError("the model's probabilities are no numbers: it computes NaN or infinite values on this text")
    return Score(tokens, nats, text_bytes)


def _text_of_line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(f"{path}: line {number} is not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise TextError(f'{path}: line {number} has no string "text"; expected {{"text": "..."}} on every line')
    if not is_text(text):
        raise TextError(f"{path}: line {number} has half of a surrogate pair, which is no character")
    return text


def is_text(text: str) -> bool:
    """Whether all of it can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
