"""Text to tokens and back, with the tokenizer that a GGUF holds; text is streamed only in whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tmexport.background import in_background
from tmexport.errors import TokenizerError, UsageError
from tmexport.gguf.names import TOKENIZER_JSON_KEY
from tmexport.gguf.reader import GGUFFile, open_gguf
from tmexport.tokenizer.gguf import added_tokens, vocabulary_as_json
from tmexport.tokenizer.parse import parse_tokenizer, read_tokenizer

_LONG = 200_000  # characters that are tokenised in a fraction of a second
_LONGEST_CHARACTER = 8  # tokens held back for an unfinished character before it is called invalid


class Tokenizer:
    """encode: text -> token ids; decode: ids -> text, special tokens left out."""

    def __init__(self, text: str, where: str, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> None:
        self._tokenizer = parse_tokenizer(text, where)
        self._before, self._after, self._template = before, after, False

    @classmethod
    def from_gguf(cls, gguf: GGUFFile | Path | str, given: Path | None = None) -> Tokenizer:
        """The tokenizer of a file: `given`, or tokenizer.huggingface.json in it, or else llama.cpp's vocabulary in it.

        Raises:
            TokenizerError: there is none, or it is damaged, or has tokens that the model has no embedding for.
        """
        file = gguf if isinstance(gguf, GGUFFile) else open_gguf(gguf)
        text, where = file.metadata.get(TOKENIZER_JSON_KEY), str(file.path)
        if given is not None:
            text, where = read_tokenizer(given), str(given)
        if not isinstance(text, str):
            text = vocabulary_as_json(file.metadata, where)
        tokenizer = cls(text, where, *added_tokens(file.metadata))
        tokenizer._check(file, where)
        return tokenizer

    @classmethod
    def from_json(cls, path: Path) -> Tokenizer:
        """The tokenizer of a tokenizer.json; `prompt` adds the tokens that its post-processor adds, such as BOS.

        Raises:
            TokenizerError: it cannot be read or is damaged.
        """
        tokenizer = cls(read_tokenizer(path), str(path))
        tokenizer._template = True
        return tokenizer

    def _check(self, file: GGUFFile, where: str) -> None:
        embedding = file.tensors.get("token_embd.weight")
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if embedding is not None and largest >= embedding.shape[0]:
            raise TokenizerError(
                f"{where}: has the token id {largest}, but {file.path} has {embedding.shape[0]} embeddings; it is another model's"
            )

    def encode(self, text: str) -> list[int]:
        return self._encode(text, special=False)

    def encode_all(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Several texts at once, with or without what the post-processor adds; the GIL is released meanwhile."""
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        except TypeError:  # surrogates, from a command line that is not UTF-8
            raise UsageError("the text is not valid Unicode; expected UTF-8") from None
        return [encoding.ids for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        """`encode`, with the tokens before and after a prompt that the file asks for.

        A GGUF says so in add_bos_token and add_eos_token, a tokenizer.json by itself in its post-processor.
        """
        return [*self._before, *self._encode(text, special=self._template), *self._after]

    def _encode(self, text: str, special: bool) -> list[int]:
        if len(text) > _LONG:
            return in_background(lambda: self.encode_all([text], special))[0]
        try:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        except TypeError:
            raise UsageError("the text is not valid Unicode; expected UTF-8") from None

    def vocabulary(self) -> dict[str, int]:
        """Every token's id by its content."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

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
