"""Where tokenizer_config.json makes transformers tokenise otherwise than the tokenizer.json beside it says, and this file does.

Tried with transformers 5.24: what a tokenizer_config.json adds counts there, and a flag of an added token too; add_bos_token
counts in transformers 4 and in llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word")


def differences(settings: dict[str, Any], raw: dict[str, Any], adds: tuple[bool, bool]) -> Iterator[str]:
    """A sentence for each kind of difference.

    Args:
        settings: tokenizer_config.json.
        raw: tokenizer.json.
        adds: whether tokenizer.json adds a token before a text, and one after it.
    """
    added = {entry["content"]: entry for entry in raw.get("added_tokens") or []}
    found = dict(_tokens(settings))
    new = [content for content in found if content not in added]
    if new:
        yield (
            f"tokenizer_config.json, or a file beside it, has the added token {_first(new)}, and tokenizer.json does not: transformers takes it for one "
            "token wherever it stands in a text, this file does not"
        )
    for flag in _FLAGS:
        other = [c for c, entry in found.items() if c in added and entry.get(flag) is True and not added[c].get(flag)]
        if other:
            yield f"tokenizer_config.json gives {_first(other)} the flag {flag}, and tokenizer.json does not: transformers follows it, this file does not"  # fmt: skip
    if settings.get("add_prefix_space") is True:
        yield "tokenizer_config.json has add_prefix_space, and tokenizer.json does not: transformers puts a space before a text, this file does not"  # fmt: skip
    if settings.get("split_special_tokens") is True:
        yield "tokenizer_config.json has split_special_tokens: transformers reads special tokens in a text as ordinary words, this file does not"
    for key, there in zip(("add_bos_token", "add_eos_token"), adds, strict=True):
        if settings.get(key) is True and not there:
            yield f"tokenizer_config.json has {key}, but tokenizer.json has no template that adds it: transformers 4 adds that token to a text, transformers 5 and this file do not"  # fmt: skip


def _tokens(settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(content, flags) of every token that becomes an added one."""
    named: list[Any] = [settings.get(key) for key in _NAMED]
    for key in _LISTS:
        value = settings.get(key)
        named += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    decoder = settings.get("added_tokens_decoder")
    named += list(decoder.values()) if isinstance(decoder, dict) else []
    for token in named:
        entry = token if isinstance(token, dict) else {"content": token}
        if isinstance(entry.get("content"), str) and entry["content"]:
            yield entry["content"], entry


def _first(contents: list[str]) -> str:
    more = f" (and {len(contents) - 1} more)" if len(contents) > 1 else ""
    return f"{contents[0][:40]!r}{more}"
