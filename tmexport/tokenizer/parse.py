"""A stranger's tokenizer.json as a tokenizer that gives the same tokens at every run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmexport.errors import TokenizerError
from tmexport.files import read_text
from tmexport.library_errors import lines_on_stderr
from tmexport.tokenizer.splits import PATTERNS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LARGEST_TOKENIZER = 2**26  # the largest in use have 30 MB
_TRIAL = "a b\u00e9"  # a template can be one that no text gets through
_COMPONENTS = {"BPE", "ByteLevel", "Split", "Digits", "Sequence", "TemplateProcessing", "String", "SpecialToken"}
_COMPONENTS |= {"NFC", "NFD", "NFKC", "NFKD"}


def read_tokenizer(path: Path) -> str:
    """The text of a tokenizer.json, without a byte order mark.

    Raises:
        TokenizerError: it cannot be read, is not UTF-8, or is larger than any tokenizer.
    """
    try:
        return read_text(path, LARGEST_TOKENIZER).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json that a stranger may have written.

    A regular expression in such a file runs on whatever the user types, and one can be written that never ends; so only
    the expressions and the components that byte-level BPE tokenizers are made of get as far as the library. What makes
    training vary or cuts a text short is switched off: dropout, truncation, padding.

    Raises:
        TokenizerError: `where`, and what was found.
    """
    from tokenizers import Tokenizer

    def check(item: dict[str, Any]) -> dict[str, Any]:
        pattern, kind = item.get("Regex"), item.get("type")
        if isinstance(pattern, str) and pattern not in PATTERNS:
            raise TokenizerError(
                f"{where}: splits text by the expression {pattern[:200]!r}, which llama.cpp has no name for"
            )
        if isinstance(kind, str) and kind not in _COMPONENTS:
            raise TokenizerError(
                f"{where}: has a component of type {kind[:40]!r}; expected a byte-level BPE (GPT-2 or GPT-NeoX style)"
            )
        return item

    try:
        if len(text) > LARGEST_TOKENIZER:
            raise ValueError(f"has more than {LARGEST_TOKENIZER} characters")
        json.loads(text, object_hook=check)
        with lines_on_stderr():  # where it panics: an error as well
            tokenizer = Tokenizer.from_str(text)
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if getattr(tokenizer.model, "dropout", None) is not None:
                tokenizer.model.dropout = None
            _try(tokenizer, where)
        return tokenizer
    except (TokenizerError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are BaseExceptions
        raise TokenizerError(f"{where}: is not a tokenizer.json the tokenizers library can load: {error}") from None


def _try(tokenizer: Tokenizer, where: str) -> None:
    try:
        tokenizer.encode(_TRIAL)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise TokenizerError(f"{where}: the tokenizers library fails at any text with it: {error}") from None
