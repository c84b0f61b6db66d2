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
        if key in metadata and not _is(metadata[key], kind):
            yield f"{key} is {repr(metadata[key])[:60]}; expected {kind}"


def is_part(metadata: Mapping[str, Any]) -> bool:
    """Whether a file is one of several that are a model together; of keys that have their kinds."""
    return bool(metadata.get("split.count", 1) > 1)


def _is(value: Any, kind: str) -> bool:
    """A list by its first item, as all are of one type in a GGUF; an empty one is a list of anything."""
    item = {_TEXTS: _TEXT, _NUMBERS: _NUMBER}.get(kind)
    if item is None:
        return _kind_of(value) == kind
    return isinstance(value, Sequence) and not isinstance(value, str) and (not len(value) or _kind_of(value[0]) == item)


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return _TEXT
    return _BOOL if isinstance(value, bool) else _NUMBER if isinstance(value, int) else "another value"
