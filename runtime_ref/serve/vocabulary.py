"""The bytes that every token stands for, and how OpenAI's interface writes one that is no whole character."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from runtime_ref.command import compile_kernels
from runtime_ref.loading import load_gguf
from runtime_ref.model import Model
from runtime_ref.tokenizer import Tokenizer
from tmexport.tokenizer.bytelevel import CHARACTER_OF

_BYTE_OF = {character: byte for byte, character in CHARACTER_OF.items()}


class Vocabulary:
    """The tokens of a tokenizer, up to the model's number of embeddings."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token id; an id without a token has none."""
        found = [b""] * self.size
        for text, index in self.tokenizer.vocabulary().items():
            known = all(c in _BYTE_OF for c in text)
            found[index] = bytes(_BYTE_OF[c] for c in text) if known else text.encode()
        return found

    @cached_property
    def special(self) -> frozenset[int]:
        """The tokens that are no text: decoding leaves them out."""
        return frozenset(i for i, piece in enumerate(self.pieces) if piece and not self.tokenizer.decode([i]))

    def name(self, token: int) -> str:
        r"""A token as text; `bytes:\xe2\x80` where it is a part of a character."""
        piece = self.pieces[token]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def load_speaker(path: Path, profile: str, threads: int | None) -> tuple[Model, Vocabulary, tuple[int, ...]]:
    """A model to talk with, its kernels compiled; its vocabulary; and the tokens that end a text.

    Raises:
        TmexportError: the file is damaged, or has no tokenizer.
    """
    loaded = load_gguf(path, profile, threads, None, need_text=True)
    assert isinstance(loaded.model, Model)
    assert loaded.tokenizer is not None
    compile_kernels(loaded.model)
    return loaded.model, Vocabulary(loaded.tokenizer, loaded.model.config.vocab_size), loaded.stop
