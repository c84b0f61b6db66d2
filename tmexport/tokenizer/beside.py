"""What lies beside a tokenizer.json and a model: chat templates, the end tokens of generation, tokens by name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmexport.documents import is_text
from tmexport.errors import CheckpointError, TokenizerError
from tmexport.files import file_in, read_text

_MORE = "additional_chat_templates"  # of transformers 5
_LARGEST = 2**24  # a tokenizer_config.json repeats the added tokens, and the template


@dataclass(frozen=True)
class Beside:
    """templates: name -> Jinja text ("" is the default one). ends: ids in order. bos, eos: tokens by their content.

    settings: what tokenizer_config.json and the older files beside it say.
    stop_strings: texts at which transformers ends a generation.
    """

    templates: dict[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()
    bos: str | None = None
    eos: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    stop_strings: tuple[str, ...] = ()


def read_beside(model: Path, tokenizer: Path) -> Beside:
    """Read config.json and generation_config.json in the model's folder, the rest in the tokenizer's.

    Raises:
        TokenizerError: a file is not what its name says.
    """
    settings = _settings(tokenizer)
    ends = dict.fromkeys(i for name in ("config.json", "generation_config.json") for i in _ids(model, name))
    bos, eos = (_content(settings, key) for key in ("bos_token", "eos_token"))
    stops = _json(model, "generation_config.json").get("stop_strings")
    stops = [stops] if isinstance(stops, str) else stops if isinstance(stops, list) else []
    texts = tuple(text for text in stops if isinstance(text, str))
    return Beside(_templates(tokenizer, settings), tuple(ends), bos, eos, settings, texts)


def _settings(folder: Path) -> dict[str, Any]:
    """What transformers 5 reads: tokenizer_config.json alone where it lists the added tokens itself; else special_tokens_map.json
    goes before it, and added_tokens.json adds its own.
    """
    settings = _json(folder, "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        return settings
    added = _json(folder, "added_tokens.json")
    for content, index in added.items():
        if type(index) is not int:
            raise TokenizerError(
                f"{folder / 'added_tokens.json'}: the id of {content!r} is {index!r}; expected a whole number"
            )
    more = {index: {"content": content} for content, index in added.items()}
    return settings | _json(folder, "special_tokens_map.json") | ({"added_tokens_decoder": more} if more else {})


def _ids(folder: Path, name: str) -> list[int]:
    value = _json(folder, name).get("eos_token_id")
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in values):
        raise TokenizerError(f"{folder / name}: eos_token_id is {value!r}; expected a token id, or a list of them")
    return values


def _templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/NAME.jinja, or else tokenizer_config.json's: a text, or named ones."""
    found = {path.stem: f"{_MORE}/{path.name}" for path in sorted((folder / _MORE).glob("*.jinja"))}
    if os.path.lexists(folder / "chat_template.jinja"):
        found["default"] = "chat_template.jinja"
    read = {name: (_text(folder, file) or "").replace("\r\n", "\n").replace("\r", "\n") for name, file in found.items()}
    templates = read or _named_templates(folder, settings.get("chat_template"))
    if not all(is_text(text) for pair in templates.items() for text in pair):
        raise TokenizerError(f"{folder}: a chat template has half of a surrogate pair, which is no character")
    return {"" if name == "default" else name: template for name, template in templates.items()}


def _named_templates(folder: Path, value: Any) -> dict[str, str]:
    """tokenizer_config.json's chat_template: a text, a list of named ones, or an object of them."""
    if value is None:
        return {}
    pairs: list[tuple[Any, Any]] = [("default", value)]
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [(e.get("name"), e.get("template")) if isinstance(e, dict) else (None, None) for e in value]
    if not all(isinstance(text, str) for pair in pairs for text in pair):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor a list of named ones")  # fmt: skip
    return dict(pairs)


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
