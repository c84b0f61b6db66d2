"""A tokenizer.json as the keys llama.cpp tokenises with, and those keys as a tokenizer.json (llama.cpp, src/llama-vocab.cpp)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmexport.errors import TokenizerError
from tmexport.gguf.names import TOKENIZER_JSON_KEY
from tmexport.model import Model
from tmexport.tokenizer.beside import Beside, read_beside
from tmexport.tokenizer.features import Features, read_features
from tmexport.tokenizer.names import ENDS, NO_END
from tmexport.tokenizer.parse import parse_tokenizer, read_tokenizer
from tmexport.tokenizer.settings import differences
from tmexport.tokenizer.splits import BY_NAME, GPT2, as_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # llama.h, enum llama_token_type
IDS_ONLY_KEY = "tmexport.token_ids_only"
_KEY = "tokenizer.ggml."


@dataclass(frozen=True)
class ExportedTokenizer:
    """text: the tokenizer.json to write; metadata: the tokenizer.* keys of a GGUF; the rest: a sentence each, for the user."""

    text: str
    metadata: dict[str, Any]
    neutralised: tuple[str, ...]
    warnings: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        """What the user should know, the differences first."""
        if not self.neutralised:
            return self.warnings
        return (*self.warnings, f"tokenizer.json is written without its {', '.join(self.neutralised)}")


def export_tokenizer(path: Path, model: Model, folder: Path | None = None) -> ExportedTokenizer:
    """A tokenizer.json as it goes into files.

    Args:
        path: of the tokenizer.json; a chat template is looked for beside it.
        model: the dimensions, and the tokens that it names.
        folder: with the model's config.json and generation_config.json; None: the tokenizer's.

    Raises:
        TokenizerError: it says something that a GGUF cannot hold, or has more tokens than the model has embeddings.
    """
    try:
        return _export(path, model, folder or path.parent)
    except TokenizerError as error:
        raise TokenizerError(f"{error}; --no-tokenizer exports the model without it") from None


def _export(path: Path, model: Model, folder: Path) -> ExportedTokenizer:
    text = read_tokenizer(path)
    tokenizer = parse_tokenizer(text, str(path))
    raw = json.loads(text)
    model_raw = raw.get("model")
    if not isinstance(model_raw, dict) or type(tokenizer.model).__name__ != "BPE" or not isinstance(model_raw.get("vocab"), dict):  # fmt: skip
        found = type(tokenizer.model).__name__
        raise TokenizerError(f"{path}: the model is {found!r}; expected a byte-level BPE (GPT-2 or GPT-NeoX style)")
    ids = _ids(path, raw, model)
    features = read_features(text, str(path))
    _check_ids(path, ids, tokenizer.get_vocab(with_added_tokens=True))
    beside = read_beside(folder, path.parent)
    added = (features.before is not None, features.after is not None)
    features.warnings += differences(beside.settings, features.raw, added)
    metadata = _vocabulary(features, ids, model.vocab_size)
    metadata |= _special(features, ids, model, beside)
    features.warnings += _not_held(beside)
    for name, template in beside.templates.items():
        metadata["tokenizer.chat_template" + (f".{name}" if name else "")] = template
    if set(beside.templates) - {""}:
        metadata["tokenizer.chat_templates"] = [name for name in beside.templates if name]
    metadata[TOKENIZER_JSON_KEY] = features.text
    return ExportedTokenizer(features.text, metadata, tuple(features.neutralised), tuple(features.warnings))


def _not_held(beside: Beside) -> Iterator[str]:
    """What a generation by transformers heeds and a GGUF cannot say, or llama.cpp cannot read."""
    if beside.stop_strings:
        yield f"generation_config.json ends a generation at the text {beside.stop_strings[0][:40]!r}, which a GGUF cannot hold: it goes on there"
    for name, template in beside.templates.items():
        fault = fault_of_template(template)
        if fault is not None:
            yield f"the chat template{' ' if name else ''}{name} is damaged ({fault}): llama.cpp's server does not load a file with it"


def fault_of_template(template: str) -> str | None:
    """Why a chat template is damaged; None if it is not, or if nothing here can tell."""
    try:  # jinja2 comes with the extras that render templates; without it a template is only carried
        from tmexport.chat_template import template_fault
    except ImportError:
        return None
    return template_fault(template)


def _ids(path: Path, raw: dict[str, Any], model: Model) -> dict[str, int]:
    ids = dict(raw["model"]["vocab"])
    for entry in raw.get("added_tokens") or []:
        if ids.setdefault(entry["content"], entry["id"]) != entry["id"]:
            raise TokenizerError(f"{path}: gives {entry['content'][:40]!r} the ids {ids[entry['content']]} and {entry['id']}")  # fmt: skip
    if len(set(ids.values())) != len(ids) or not all(isinstance(i, int) and i >= 0 for i in ids.values()):
        raise TokenizerError(f"{path}: token ids are not distinct whole numbers")
    if ids and max(ids.values()) >= model.vocab_size:
        raise TokenizerError(
            f"{path}: has the token id {max(ids.values())}, but the model has {model.vocab_size} embeddings; it is another model's"
        )
    return ids


def _check_ids(path: Path, ids: dict[str, int], loaded: dict[str, int]) -> None:
    """The tokenizers library numbers added tokens itself where the file leaves a gap before them."""
    for token, index in ids.items():
        if loaded.get(token) != index:
            raise TokenizerError(
                f"{path}: gives {token[:40]!r} the id {index}, but the tokenizers library gives it {loaded.get(token)}; "
                "expected ids without a gap before the added tokens"
            )


def _vocabulary(features: Features, ids: dict[str, int], rows: int) -> dict[str, Any]:
    added = {entry["content"]: entry for entry in features.raw.get("added_tokens") or []}
    tokens, types = [_padding(i, ids) for i in range(rows)], [UNUSED] * rows
    for content, index in ids.items():
        tokens[index] = content
        types[index] = NORMAL if content not in added else CONTROL if added[content].get("special") else USER_DEFINED
    merges = features.raw["model"].get("merges") or [_no_merge(ids)]
    # GPT-NeoX's own file has this token; it splits as GPT-2 does, and llama.cpp has a name for it
    pre = "olmo" if features.steps == (GPT2,) and ids.get("<|padding|>") == 1 else features.pre
    return {
        _KEY + "model": "gpt2",
        _KEY + "pre": pre,
        _KEY + "tokens": tokens,
        _KEY + "token_type": types,
        _KEY + "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    }


def _no_merge(ids: dict[str, int]) -> str:
    """A merge that changes no text, for llama.cpp, which wants one: its result is no token, so that its parts come out."""
    single = [token for token in ids if len(token) == 1 and token.isascii()]
    return next((f"{left} {right}" for left in single for right in single if left + right not in ids), "[ P")


def _padding(index: int, ids: dict[str, int]) -> str:
    """The name of an embedding row without a token; llama.cpp wants every name once."""
    name = f"[PAD{index}]"
    while name in ids:
        name = f"[{name}]"
    return name


def _special(features: Features, ids: dict[str, int], model: Model, beside: Beside) -> dict[str, Any]:
    """add_bos_token, bos, eos and the other end tokens, unknown: in the order of the file."""
    metadata: dict[str, Any] = {_KEY + "add_bos_token": features.before is not None}
    if features.after is not None:
        metadata[_KEY + "add_eos_token"] = True
    end = ids.get("<|endoftext|>", model.eos_token_id)
    ends = [model.eos_token_id] if model.eos_token_id is not None else []
    ends += [i for i in beside.ends if i not in ends and i < model.vocab_size]
    beyond = [i for i in beside.ends if i >= model.vocab_size]
    if beyond:
        features.warnings.append(f"the end token {beyond[0]} is left out; the model has {model.vocab_size} embeddings")
    if not ends and (named := ids.get(beside.eos or "", end)) is not None:
        ends = [named]
    if features.after is not None:  # llama.cpp adds eos
        ends = [ids[features.after], *(i for i in ends if i != ids[features.after])]
    bos = model.bos_token_id if model.bos_token_id is not None else ids.get(beside.bos or "", end)
    bos = ids[features.before] if features.before is not None else bos
    if not ends:
        features.warnings.append(
            f"neither the model nor the tokenizer names an end token; llama.cpp ends at the token {NO_END}"
        )
    values = {"bos": bos, "eos": ends[0] if ends else None, "unknown": end}
    values |= dict(zip(("eot", "eom"), _other_ends(features, ids, ends), strict=False))
    return metadata | {f"{_KEY}{name}_token_id": index for name, index in values.items() if index is not None}


def _other_ends(features: Features, ids: dict[str, int], ends: list[int]) -> list[int]:
    """The end tokens besides the first that llama.cpp does not know by their text."""
    names = {index: content for content, index in ids.items()}
    others = [i for i in ends[1:] if names.get(i) not in ENDS]
    for index in others[2:]:
        features.warnings.append(f"the end token {index} ({names.get(index)!r}) is left out; a GGUF has room for three, and for those that llama.cpp knows by name")  # fmt: skip
    return others[:2]


def without_tokenizer(model: Model) -> ExportedTokenizer:
    """The keys of a file that takes token ids only: llama.cpp runs it, with names that stand for no text.

    (It loads "tokenizer.ggml.model": "none" as well, but its server ends at the first token that it wants to show.)
    """
    rows = model.vocab_size
    metadata: dict[str, Any] = {
        _KEY + "model": "gpt2",
        _KEY + "pre": "gpt-2",
        _KEY + "tokens": [f"[PAD{i}]" for i in range(rows)],
        _KEY + "token_type": [UNUSED] * rows,
        _KEY + "merges": ["[ P"],  # it wants one; the result is no token
        _KEY + "add_bos_token": False,
    }
    warnings = []
    for name, index in (("bos", model.bos_token_id), ("eos", model.eos_token_id)):
        if index is not None:
            metadata[f"{_KEY}{name}_token_id"] = index
    if model.eos_token_id is None:
        warnings.append(f"the model names no end token; llama.cpp ends at the token {NO_END}")
    return ExportedTokenizer("", metadata | {IDS_ONLY_KEY: True}, (), tuple(warnings))


def has_vocabulary(metadata: Mapping[str, Any]) -> bool:
    """Whether a GGUF takes texts, and not token ids only."""
    return metadata.get(_KEY + "model", "none") != "none" and metadata.get(IDS_ONLY_KEY) is not True


def stop_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end a generation, as llama.cpp takes them from a GGUF's keys: eos first."""
    found = [metadata.get(f"{_KEY}{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens = metadata.get(_KEY + "tokens", ())
    found += [index for index, token in enumerate(tokens) if token in ENDS]
    return tuple(dict.fromkeys(i for i in found if type(i) is int and 0 <= i < len(tokens)))


def added_tokens(metadata: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a GGUF wants before and after a prompt."""

    def wanted(name: str) -> tuple[int, ...]:
        index = metadata.get(f"{_KEY}{name}_token_id")
        return (index,) if metadata.get(f"{_KEY}add_{name}_token") is True and type(index) is int else ()

    return wanted("bos"), wanted("eos")


def vocabulary_as_json(metadata: Mapping[str, Any], where: str) -> str:
    """The text of a tokenizer.json that tokenises as llama.cpp does with a GGUF's own keys.

    Raises:
        TokenizerError: the file has no byte-level BPE, or splits text in a way that this release does not know.
    """
    kind, pre = metadata.get(_KEY + "model"), metadata.get(_KEY + "pre")
    tokens, merges = metadata.get(_KEY + "tokens"), metadata.get(_KEY + "merges")
    if not has_vocabulary(metadata):
        raise TokenizerError(f"{where}: has no tokenizer.huggingface.json and no vocabulary; give the model's tokenizer.json with --tokenizer")  # fmt: skip
    if kind != "gpt2" or tokens is None or merges is None:
        what = f"a vocabulary of the kind {kind!r}"
        raise TokenizerError(f"{where}: has {what}; expected a byte-level BPE; give the model's tokenizer.json with --tokenizer")  # fmt: skip
    if pre not in BY_NAME:
        known = ", ".join(sorted(BY_NAME))
        raise TokenizerError(
            f"{where}: splits text as {pre!r}, which this release does not know (it knows {known}); give the model's tokenizer.json with --tokenizer"
        )
    tokens, types = list(tokens), list(metadata.get(_KEY + "token_type") or [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise TokenizerError(f"{where}: has {len(tokens)} tokens and {len(types)} token types; expected as many")
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": types[i] != USER_DEFINED}
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    steps, ignore_merges = BY_NAME[pre]
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": ignore_merges,
        "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}, "merges": list(merges),
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    raw = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
           "pre_tokenizer": as_json(steps), "post_processor": None, "decoder": byte_level, "model": model}  # fmt: skip
    return json.dumps(raw, ensure_ascii=False)
