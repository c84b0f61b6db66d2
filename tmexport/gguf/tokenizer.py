"""A Hugging Face tokenizer.json as the keys llama.cpp tokenises with (llama.cpp, src/llama-vocab.cpp).

Only byte-level BPE is supported, which is what every Mamba-2 in use has. The pre-tokenizer is recognised by what it
says, not by a hash of known models, so a tokenizer trained yesterday exports too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmexport.config import Mamba2Config
from tmexport.errors import TokenizerError
from tmexport.files import read_text
from tmexport.gguf.names import TOKENIZER_JSON_KEY

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LARGEST_TOKENIZER = 2**26  # the largest in use have 30 MB
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.h, enum llama_token_type

# Split patterns that llama.cpp knows under a name; ByteLevel's own pattern is GPT-2's.
_SPLIT_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
_COMPONENTS = {"BPE", "ByteLevel", "Split", "Sequence", "TemplateProcessing", "String", "SpecialToken"}
_COMPONENTS |= {"NFC", "NFD", "NFKC", "NFKD"}


def tokenizer_metadata(path: Path, config: Mamba2Config) -> dict[str, Any]:
    """The tokenizer.* keys of a GGUF.

    Raises:
        TokenizerError: not a byte-level BPE, a pre-tokenizer llama.cpp has no name for, or more tokens than embeddings.
    """
    text, raw = _load(path)
    model = raw.get("model") if isinstance(raw.get("model"), dict) else {}
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise TokenizerError(
            f"{path}: the model is {model.get('type')!r}; expected a byte-level BPE (GPT-2 or GPT-NeoX style)"
        )
    vocab: dict[str, int] = model["vocab"]
    added = {entry["content"]: entry for entry in raw.get("added_tokens") or []}
    ids = dict(vocab) | {content: entry["id"] for content, entry in added.items()}
    if len(set(ids.values())) != len(ids) or not all(isinstance(i, int) and i >= 0 for i in ids.values()):
        raise TokenizerError(f"{path}: token ids are not distinct whole numbers")
    if ids and max(ids.values()) >= config.vocab_size:
        raise TokenizerError(
            f"{path}: has the token id {max(ids.values())}, but the model has {config.vocab_size} embeddings; it is another model's"
        )
    tokens, types = [f"[PAD{i}]" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    for content, index in ids.items():
        tokens[index] = content
        types[index] = NORMAL if content not in added else CONTROL if added[content].get("special") else USER_DEFINED
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(path, raw, ids),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(path, merge) for merge in model.get("merges") or []],
        "tokenizer.ggml.add_bos_token": False,
    }
    end = ids.get("<|endoftext|>", config.eos_token_id)
    for key, index in (
        ("bos", config.bos_token_id if config.bos_token_id is not None else end),
        ("eos", config.eos_token_id if config.eos_token_id is not None else end),
        ("unknown", end),
    ):
        if index is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = index
    metadata[TOKENIZER_JSON_KEY] = text
    return metadata


def _load(path: Path) -> tuple[str, dict[str, Any]]:
    """The file's text and its JSON, after `parse_tokenizer` has accepted it."""
    try:
        text = read_text(path, _LARGEST_TOKENIZER)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    parse_tokenizer(text, str(path))
    return text, json.loads(text)


def parse_tokenizer(text: str, where: str) -> Tokenizer:
    """A tokenizer from the text of a tokenizer.json that a stranger may have written.

    A regular expression in such a file runs on whatever the user types, and one can be written that never ends; so only
    the expressions and the components that byte-level BPE tokenizers are made of get as far as the library. Padding and
    truncation, which the file can set to any length, are switched off.

    Raises:
        TokenizerError: `where`, and what was found.
    """
    from tokenizers import Tokenizer

    def check(item: dict[str, Any]) -> dict[str, Any]:
        pattern, kind = item.get("Regex"), item.get("type")
        if isinstance(pattern, str) and pattern not in _SPLIT_PATTERNS:
            raise TokenizerError(
                f"{where}: splits text by the expression {pattern[:200]!r}, which llama.cpp has no name for"
            )
        if isinstance(kind, str) and kind not in _COMPONENTS:
            raise TokenizerError(
                f"{where}: has a component of type {kind[:40]!r}; expected a byte-level BPE (GPT-2 or GPT-NeoX style)"
            )
        return item

    try:
        if len(text) > _LARGEST_TOKENIZER:
            raise ValueError(f"has more than {_LARGEST_TOKENIZER} characters")
        json.loads(text, object_hook=check)
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    except (TokenizerError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its panics are BaseExceptions
        raise TokenizerError(f"{where}: is not a tokenizer.json the tokenizers library can load: {error}") from None


def _pre(path: Path, raw: dict[str, Any], ids: dict[str, int]) -> str:
    """llama.cpp's name for the way this tokenizer splits text before the merges."""
    pre = raw.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    byte_level = [part for part in parts if part.get("type") == "ByteLevel"]
    if len(byte_level) != 1 or byte_level[0].get("add_prefix_space"):
        raise TokenizerError(
            f"{path}: expected one ByteLevel pre-tokenizer that adds no space; llama.cpp has no name for another"
        )
    splits = [part for part in parts if part.get("type") == "Split"]
    if len(parts) == 1 and byte_level[0].get("use_regex", True):
        return "olmo" if ids.get("<|padding|>") == 1 else "gpt-2"  # GPT-NeoX's own file; both split as GPT-2 does
    if len(parts) == 2 and len(splits) == 1 and not byte_level[0].get("use_regex", True):
        pattern = splits[0].get("pattern", {}).get("Regex")
        if pattern in _SPLIT_PATTERNS and splits[0].get("behavior") == "Isolated" and not splits[0].get("invert"):
            return _SPLIT_PATTERNS[pattern]
    raise TokenizerError(
        f"{path}: splits text in a way llama.cpp has no name for ({json.dumps(pre)[:200]}); "
        "expected GPT-2's, GPT-NeoX's, Llama 3's or Qwen 2's"
    )


def _merge(path: Path, merge: Any) -> str:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or any(" " in part for part in pair):
        raise TokenizerError(f"{path}: the merge {merge!r} is not a pair of tokens without spaces")
    return " ".join(pair)
