"""The errors a user may see: one line that says what was found, what was expected and what to do."""

from __future__ import annotations


class TmexportError(Exception):
    """Base of every error this project raises on purpose; the command line prints it as one line and exits."""

    exit_code = 1


class UsageError(TmexportError):
    """The command was asked for something that cannot be (exit code 2)."""

    exit_code = 2


class ConfigError(TmexportError):
    """A config.json, or a file's metadata, does not describe a Mamba-2 model we can represent."""


class CheckpointError(TmexportError):
    """A checkpoint folder is incomplete, contradictory or damaged."""


class NotTernaryError(TmexportError):
    """A weight that must be exactly ternary is not."""


class TokenizerError(TmexportError):
    """A tokenizer that the target format cannot represent faithfully."""


class GGUFError(TmexportError):
    """A GGUF file is damaged, malicious, or not the model it should be."""
