"""Where the prompt of `generate` comes from: the command line, a file, a pipe, or token ids."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

from tmexport.documents import decoded, read_text
from tmexport.errors import TextError, UsageError

STDIN = "-"
LARGEST_PROMPT = 2**26  # bytes, some 15 million tokens: a pipe need not end, and memory does
_HOW = "give --prompt TEXT, --prompt-file FILE, --prompt - to read stdin, or --tokens 1,2,3"


def read_prompt(prompt: str | None, file: Path | None, tokens: str | None) -> str | list[int]:
    """The text to continue, or its token ids. Without any of the three: what is piped in.

    One line break at the end of a file or pipe is not part of the text.

    Raises:
        UsageError: two of them are given, or none and stdin is a terminal; ids that are no whole numbers.
        TextError: a text that cannot be read or is not UTF-8.
    """
    if sum(value is not None for value in (prompt, file, tokens)) > 1:
        raise UsageError(f"two prompts: {_HOW} (-n is the number of tokens to make)")
    if tokens is not None:
        return _ids(tokens)
    if prompt is not None and prompt != STDIN:
        return _argument(prompt)
    if file is not None and str(file) != STDIN:
        return _without_last_break(read_text(file, LARGEST_PROMPT))
    if prompt is None and file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError(f"no prompt: {_HOW}")
    return _without_last_break(_read_stdin())


def _argument(text: str) -> str:
    """A text of the command line as UTF-8, also where the locale says otherwise and Python could not read it (LC_ALL=C)."""
    with contextlib.suppress(UnicodeError):
        return os.fsencode(text).decode()
    return text


def _ids(text: str) -> list[int]:
    words = re.split(r"[,\s]+", text.strip(", \t\n"))
    if not all(re.fullmatch(r"\d{1,18}", word) for word in words):
        raise UsageError(f"--tokens is {text[:80]!r}; expected ids with commas between them: 1,2,3")
    return [int(word) for word in words]


def _read_stdin() -> str:
    """As a file is read: UTF-8, without a byte order mark, line breaks of any system."""
    if sys.stdin is None:
        raise TextError("stdin: is closed; expected the text to continue")
    try:
        return decoded("stdin", sys.stdin.buffer.read(LARGEST_PROMPT + 1), LARGEST_PROMPT)
    except OSError as error:
        raise TextError(f"stdin: cannot be read: {error.strerror or error}") from None


def _without_last_break(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
