"""The errors a user may see: one line that says what was found, what was expected and what to do."""

from __future__ import annotations

_LONGEST_MESSAGE = 1000


def one_line(text: str) -> str:
    """`text` with its middle cut out if it is very long, and what is not printable escaped."""
    if len(text) > _LONGEST_MESSAGE:
        text = text[: _LONGEST_MESSAGE // 2] + " ... " + text[-_LONGEST_MESSAGE // 2 :]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class TmexportError(Exception):
    """Base of every error this project raises on purpose; the command line prints it as one line and exits.

    Its text is one line of printable characters whatever it quotes: names and values in a stranger's file may hold
    line breaks, terminal escapes or a megabyte of padding.
    """

    exit_code = 1

    def __str__(self) -> str:
        return one_line(super().__str__())


class UsageError(TmexportError):
    """The command was asked for something that cannot be (exit code 2)."""

    exit_code = 2


class TextError(UsageError):
    """A text to train on, to score or to continue cannot be used."""


class ConfigError(TmexportError):
    """A config.json, or a file's metadata, does not describe a Mamba-2 model we can represent."""


class CheckpointError(TmexportError):
    """A checkpoint folder is incomplete, contradictory or damaged."""


class NotTernaryError(TmexportError):
    """A weight that must be exactly ternary is not."""


class ScaleError(NotTernaryError):
    """A weight is ternary but for its scales, which are no fp16 numbers; asked to, an export rounds them."""


class TokenizerError(TmexportError):
    """A tokenizer that the target format cannot represent faithfully."""


class GGUFError(TmexportError):
    """A GGUF file is damaged, malicious, or not the model it should be."""
