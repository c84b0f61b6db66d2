"""Text to tokens and back, with the tokenizer.json inside the GGUF; text is streamed only in whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tmexport.background import in_background
from tmexport.errors import TokenizerError, UsageError
from tmexport.gguf.names import TOKENIZER_JSON_KEY
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.gguf.tokenizer import parse_tokenizer

_LONG = 200_000  # characters that are tokenised in a fraction of a second
_LONGEST_CHARACTER = 8  # tokens held back for an unfinished character before it is called invalid


class Tokenizer:
    """encode: text -> token ids; decode: ids -> text, special tokens left out."""

    def __init__(self, text: str, where: str) -> None:
        self._tokenizer = parse_tokenizer(text, where)

    @classmethod
    def from_gguf(cls, gguf: GGUFFile | Path | str) -> Tokenizer:
        """The tokenizer stored under tokenizer.huggingface.json.

        Raises:
            TokenizerError: there is none, or it is damaged.
        """
        file = gguf if isinstance(gguf, GGUFFile) else open_gguf(gguf)
        text = file.metadata.get(TOKENIZER_JSON_KEY)
        if not isinstance(text, str):
            raise TokenizerError(
                f"{file.path}: has no {TOKENIZER_JSON_KEY}; export it again with `tmexport gguf --tokenizer tokenizer.json`"
            )
        return cls(text, str(file.path))

    def encode(self, text: str) -> list[int]:
        if len(text) > _LONG:
            return in_background(lambda: self.encode_all([text]))[0]
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # surrogates, from a command line that is not UTF-8
            raise UsageError("the text is not valid Unicode; expected UTF-8") from None

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Several texts at once; the GIL is released meanwhile."""
        try:
            return [
                encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            ]
        except TypeError:
            raise UsageError("the text is not valid Unicode; expected UTF-8") from None

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact content."""
        return self._tokenizer.token_to_id(token)

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Decodes token by token; `push` returns the text that became complete, `flush` whatever is left."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # already shown; some decoders need the neighbour on the left
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(token)
        return self._take(force=len(self._pending) >= _LONGEST_CHARACTER)

    def flush(self) -> str:
        return self._take(force=True)

    def _take(self, force: bool) -> str:
        shown = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._pending)
        if text.endswith("\ufffd") and not force:
            return ""
        self._context, self._pending = self._pending, []
        return text[len(shown) :]
