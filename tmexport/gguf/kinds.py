"""The kinds of value that a GGUF's keys must have: llama.cpp ends at another one, and so do we."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_TEXT, _NUMBER, _BOOL, _TEXTS, _NUMBERS = "a text", "a whole number", "true or false", "a list of texts", "a list of whole numbers"  # fmt: skip
_ID = "tokenizer.ggml.{}_token_id"
KINDS = {
    "general.architecture": _TEXT,
    "general.type": _TEXT,
    "general.name": _TEXT,
    "split.no": _NUMBER,
    "split.count": _NUMBER,
    "tokenizer.chat_template": _TEXT,
    "tokenizer.huggingface.json": _TEXT,
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.tokens": _TEXTS,
    "tokenizer.ggml.merges": _TEXTS,
    "tokenizer.ggml.token_type": _NUMBERS,
    "tokenizer.ggml.add_bos_token": _BOOL,
    "tokenizer.ggml.add_eos_token": _BOOL,
    **{_ID.format(name): _NUMBER for name in ("bos", "eos", "eot", "eom", "unknown", "padding")},
}


def wrong_kinds(metadata: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each key whose value is of another kind."""
    for key, kind in KINDS.items():
        if key in metadata and _kind_of(metadata[key]) not in (
            kind,
            "an empty list" if kind in (_TEXTS, _NUMBERS) else kind,
        ):
            yield f"{key} is {repr(metadata[key])[:60]}; expected {kind}"


def _kind_of(value: Any) -> str:
    """By the first item of a list: all are of one type in a GGUF."""
    if isinstance(value, str):
        return _TEXT
    if isinstance(value, Sequence):
        return (
            {_TEXT: _TEXTS, _NUMBER: _NUMBERS}.get(_kind_of(value[0]), "another list")
            if len(value)
            else "an empty list"
        )
    return _BOOL if isinstance(value, bool) else _NUMBER if isinstance(value, int) else "another value"
