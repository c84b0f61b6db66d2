"""What lies beside a tokenizer.json and a model: chat templates, the end tokens of generation, tokens by name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmexport.errors import CheckpointError, TokenizerError
from tmexport.files import file_in, read_text

_MORE = "additional_chat_templates"  # of transformers 5
_LARGEST = 2**24  # a tokenizer_config.json repeats the added tokens, and the template


@dataclass(frozen=True)
class Beside:
    """templates: name -> Jinja text ("" is the default one). ends: ids in order. bos, eos: tokens by their content.

    settings: what tokenizer_config.json says.
    """

    templates: dict[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    bos: str | None = None
    eos: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def read_beside(model: Path, tokenizer: Path) -> Beside:
    """Read config.json and generation_config.json in the model's folder, the rest in the tokenizer's.

    Raises:
        TokenizerError: a file is not what its name says.
    """
    settings = _json(tokenizer, "tokenizer_config.json")
    ends: list[int] = []
    for name in ("config.json", "generation_config.json"):
        ends += [i for i in _ids(model, name) if i not in ends]
    named = _json(tokenizer, "special_tokens_map.json") | settings
    bos, eos = (_content(named, key) for key in ("bos_token", "eos_token"))
    return Beside(_templates(tokenizer, settings), tuple(ends), bos, eos, settings)


def _ids(folder: Path, name: str) -> list[int]:
    value = _json(folder, name).get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in values):
        raise TokenizerError(f"{folder / name}: eos_token_id is {value!r}; expected a token id, or a list of them")
    return values


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/NAME.jinja, or else tokenizer_config.json's: a text, or named ones."""
    more = sorted((folder / _MORE).glob("*.jinja"))
    templates = {path.stem: _text(folder, f"{_MORE}/{path.name}") or "" for path in more}
    text = _text(folder, "chat_template.jinja")
    found = settings.get("chat_template") if text is None else text
    if found is None:
        return templates
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    for entry in entries:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(template, str):
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of named ones")  # fmt: skip
        templates["" if name == "default" else name] = template
    return templates


def _content(settings: dict[str, Any], key: str) -> str | None:
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _json(folder: Path, name: str) -> dict[str, Any]:
    text = _text(folder, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{folder / name}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{folder / name}: is not a JSON object")
    return value


def _text(folder: Path, name: str) -> str | None:
    if not os.path.lexists(folder / name):
        return None
    try:
        return read_text(file_in(folder, name), _LARGEST).removeprefix("\ufeff")
    except (OSError, ValueError, CheckpointError) as error:
        raise TokenizerError(f"{folder / name}: cannot be read: {error}") from None
