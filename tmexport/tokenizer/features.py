"""What a tokenizer.json says, compared field by field with what a GGUF will say and llama.cpp will do.

The tables below list every field that is understood; a field that is in none of them is refused. Each is either
carried over (the keys in gguf.py), neutralised (what varies in training or cuts a text short: the text is written without
it), warned about with an example, or refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tmexport.errors import TokenizerError
from tmexport.tokenizer.bytelevel import CHARACTERS, missing_bytes, sample_with
from tmexport.tokenizer.names import SPECIAL
from tmexport.tokenizer.overlaps import overlapping
from tmexport.tokenizer.splits import LLAMA3, NAMES, QWEN2, Steps, steps_of

DECOMPOSED = "cafe\u0301"  # an e and an accent of its own
LONG_S = "'\u017ft"  # (?i:'s) matches it
NEUTRAL = "neutral"


@dataclass
class Features:
    """What a tokenizer.json says.

    text: as it is written into files: with nothing left that depends on the run.
    raw: the same as JSON.
    steps, ignore_merges: how it splits and merges; pre: llama.cpp's name for that.
    before, after: the tokens that the post-processor adds.
    neutralised, warnings: what was switched off, and where llama.cpp's tokens will differ; one sentence each.
    """

    text: str
    raw: dict[str, Any]
    steps: Steps = ()
    ignore_merges: bool = False
    before: str | None = None
    after: str | None = None
    neutralised: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def pre(self) -> str:
        return NAMES[self.steps, self.ignore_merges]


class _Refused(Exception):
    """The end of a sentence that begins with the file."""


def read_features(text: str, where: str) -> Features:
    """Compare a tokenizer.json that the tokenizers library can load with what a GGUF can say.

    Raises:
        TokenizerError: it says something that a GGUF cannot, or that this release does not know.
    """
    features = Features(text, json.loads(text))
    try:
        _fields(features, features.raw, _FILE, "the file")
        _fields(features, features.raw["model"], _MODEL, "the model")
        for entry in features.raw.get("added_tokens") or []:
            _fields(features, entry, _ADDED, f"the added token {str(entry.get('content'))[:40]!r}")
        features.ignore_merges = bool(features.raw["model"].get("ignore_merges"))
        _splits(features)
        _tokens(features)
    except _Refused as reason:
        raise TokenizerError(f"{where}: {reason}") from None
    if features.neutralised:
        features.text = json.dumps(features.raw, ensure_ascii=False, separators=(",", ":"))
    return features


Check = Callable[[Features, Any, str], object]


def _fields(features: Features, item: dict[str, Any], known: dict[str, Check], what: str) -> None:
    for name in list(item):
        if name not in known:
            raise _Refused(f"{what} has the field {name!r}, which this release does not know")
        if known[name](features, item[name], f"{what} has {name}") == NEUTRAL:
            item[name] = None
            features.neutralised.append(name)


def _any(*_: Any) -> None:
    """Carried over as it is, or checked elsewhere."""


def _only(*allowed: Any) -> Check:
    def check(_: Features, value: Any, what: str) -> None:
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise _Refused(f"{what} {str(value)[:60]!r}, which llama.cpp does not do; expected {allowed[0]!r}")

    return check


def _neutral(_: Features, value: Any, what: str) -> str | None:
    return None if value is None else NEUTRAL


def _normalizer(features: Features, value: Any, what: str) -> None:
    if value is None:
        return
    kind = value.get("type") if isinstance(value, dict) else value
    if kind == "Sequence" and set(value) == {"type", "normalizers"}:
        for part in value["normalizers"]:
            _normalizer(features, part, what)
    elif kind == "NFC" and set(value) == {"type"}:
        features.warnings.append(
            "the tokenizer composes characters first (NFC), llama.cpp does not: decomposed text, such as "
            f"{ascii(DECOMPOSED)[1:-1]}, gives other tokens there"
        )
    else:
        raise _Refused(f"{what} {str(kind)[:40]!r}: llama.cpp does not change a text before it splits it; expected none, or NFC")  # fmt: skip


def _post_processor(features: Features, value: Any, what: str) -> None:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind in (None, "ByteLevel"):  # ByteLevel here moves offsets only
        return
    if kind == "Sequence" and set(value) == {"type", "processors"}:
        for part in value["processors"]:
            _post_processor(features, part, what)
    elif kind == "TemplateProcessing" and set(value) <= {"type", "single", "pair", "special_tokens"}:
        _template(features, value, what)
    else:
        raise _Refused(f"{what} {str(kind)[:40]!r}; expected ByteLevel, or a template with at most one token before the text and one after it")  # fmt: skip


def _template(features: Features, value: dict[str, Any], what: str) -> None:
    """One special token before the text, one after it, or neither."""
    names: list[str | None] = []
    for piece in value["single"]:
        if "Sequence" in piece:
            if piece["Sequence"].get("id") != "A":  # the library panics at the first text
                raise _Refused(f"{what} a template whose single text is {piece['Sequence'].get('id')!r}; expected 'A'")
            names.append(None)
        else:
            token = piece["SpecialToken"]["id"]
            if token not in value["special_tokens"]:
                raise _Refused(f"{what} a template with {token!r}, which its special_tokens do not have")
            names += _tokens_of(features, value["special_tokens"][token], what)
    before, _, after = _around(names)
    known = names.count(None) == 1 and len(before) <= 1 and len(after) <= 1
    if not known or features.before is not None or features.after is not None:
        raise _Refused(f"{what} a template that adds {names}; expected at most one token before the text and one after it")  # fmt: skip
    features.before, features.after = (before or [None])[0], (after or [None])[0]


def _tokens_of(features: Features, entry: dict[str, Any], what: str) -> list[str]:
    """What a special token of a template stands for: the library takes its ids, a GGUF its tokens."""
    ids = features.raw["model"]["vocab"] | {a["content"]: a["id"] for a in features.raw.get("added_tokens") or []}
    for token, index in zip(entry["tokens"], entry["ids"], strict=False):
        if ids.get(token) != index:
            raise _Refused(f"{what} a template that gives {token[:40]!r} the id {index}; the vocabulary gives it {ids.get(token)}")  # fmt: skip
    if len(entry["tokens"]) != len(entry["ids"]):
        raise _Refused(f"{what} a template with {len(entry['tokens'])} tokens and {len(entry['ids'])} ids for them")
    return entry["tokens"]


def _around(names: list[str | None]) -> tuple[list[str | None], None, list[str | None]]:
    at = names.index(None) if None in names else len(names)
    return names[:at], None, names[at + 1 :]


def _decoder(features: Features, value: Any, what: str) -> None:
    kinds = list(_decoders(value))
    if kinds != ["ByteLevel"]:
        raise _Refused(f"{what} {' and '.join(kinds)[:40]!r}; expected ByteLevel, as llama.cpp writes tokens as text")


def _decoders(value: Any) -> Iterator[str]:
    kind = value.get("type") if isinstance(value, dict) else value
    if kind == "Sequence" and set(value) == {"type", "decoders"}:
        for part in value["decoders"]:
            yield from _decoders(part)
    else:
        yield str(kind)


_NO = _only(False)
_FILE: dict[str, Check] = {
    "version": _only("1.0"),
    "truncation": _neutral,
    "padding": _neutral,
    "added_tokens": _any,
    "normalizer": _normalizer,
    "pre_tokenizer": _any,  # _splits
    "post_processor": _post_processor,
    "decoder": _decoder,
    "model": _any,
}
_MODEL: dict[str, Check] = {
    "type": _only("BPE"),
    "dropout": _neutral,
    "unk_token": _any,  # _tokens
    "continuing_subword_prefix": _only(None, ""),
    "end_of_word_suffix": _only(None, ""),
    "fuse_unk": _any,
    "byte_fallback": _NO,
    "ignore_merges": _any,  # _splits
    "vocab": _any,
    "merges": _any,
}
_ADDED: dict[str, Check] = {
    "id": _any,
    "content": _any,
    "single_word": _NO,
    "lstrip": _NO,
    "rstrip": _NO,
    "normalized": _any,
    "special": _any,
}


def _splits(features: Features) -> None:
    steps = steps_of(features.raw.get("pre_tokenizer"))
    if isinstance(steps, str):
        raise _Refused(steps)
    if (steps, features.ignore_merges) not in NAMES:
        whether = "keeps a word that is a token whole (ignore_merges)" if features.ignore_merges else "always merges"
        raise _Refused(f"{whether}; llama.cpp does the opposite for text that is split as {'+'.join(steps)[:60]!r}")
    features.steps = steps
    if LLAMA3 in steps or QWEN2 in steps:
        features.warnings.append(
            f"the text {ascii(LONG_S)[1:-1]!r} may give other tokens in llama.cpp: it splits 's off, but not before a long s (U+017F)"
        )


def _tokens(features: Features) -> None:
    """What llama.cpp does with single tokens by their text."""
    vocabulary, added = features.raw["model"]["vocab"], features.raw.get("added_tokens") or []
    contents = {entry["content"] for entry in added}
    ordinary = sorted((SPECIAL & set(vocabulary)) - contents)
    if ordinary:  # Qwen's own files: </s>
        features.warnings.append(
            f"{ordinary[0]!r} is an ordinary token, but llama.cpp takes it for a special one by its name: the text {ordinary[0]!r} may give other tokens there"
        )
    for content in contents:
        if not content or "\0" in content:
            raise _Refused(f"has the added token {content!r}; a GGUF cannot hold it")
        if content not in vocabulary and not content.isascii() and set(content) <= CHARACTERS:
            raise _Refused(f"has the added token {content!r}, which llama.cpp could not tell from bytes written as characters")  # fmt: skip
    _merges(features)
    missing = missing_bytes(vocabulary)
    if missing:
        unknown = features.raw["model"].get("unk_token")
        becomes = "joins what is around them" if unknown is None else f"puts {unknown!r} there"
        features.warnings.append(
            f"the vocabulary has no token for {len(missing)} of the bytes of UTF-8; the tokenizer {becomes}, llama.cpp leaves them out: "
            f"a text with {ascii(sample_with(missing[0]))[1:-1]} may give other tokens there"
        )
    odd = sorted(_written_otherwise(vocabulary, added))
    if odd:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        features.warnings.append(
            f"the token {odd[0][:40]!r}{more} is not spelled as the other tokens are: where the model generates it, llama.cpp writes other text"
        )
    pair = overlapping(added)
    if pair is not None:
        features.warnings.append(
            f"the added tokens {pair.first!r} and {pair.second!r} can overlap; in {pair.text!r} the tokenizer takes {pair.ours!r}, llama.cpp {pair.theirs!r}"
        )


def _written_otherwise(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> Iterator[str]:
    """Tokens whose text llama.cpp does not write as the tokenizer does: it takes ordinary ones for bytes written as
    characters, always, and added ones for plain text, always. (Special ones are shown by neither.)
    """
    special = {entry["content"]: bool(entry.get("special")) for entry in added}
    for token in vocabulary:
        plain = not token or not set(token) <= CHARACTERS
        if (token not in special and plain) or (special.get(token) is False and not plain and not token.isascii()):
            yield token


def _merges(features: Features) -> None:
    seen = set()
    for merge in features.raw["model"].get("merges") or []:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        if len(pair) != 2 or any(" " in part for part in pair):
            raise _Refused(f"the merge {merge!r} is not a pair of tokens without spaces")
        if pair in seen:
            raise _Refused(f"has the merge {' '.join(pair)!r} twice; the tokenizer takes the last, llama.cpp the first")
        seen.add(pair)
