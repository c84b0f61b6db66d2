"""What is wrong with the keys of a GGUF, and what is no fault."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tmexport.doctor.header import Header
from tmexport.gguf.kinds import is_part, wrong_kinds
from tmexport.tokenizer.gguf import fault_of_template
from tmexport.tokenizer.names import NO_END

_NOT_READ = ("tokenizer.chat_template", "tokenizer.huggingface")  # by llama.cpp, at loading
_NEEDED = ("embedding_length", "block_count")  # by llama.cpp, of every model that it computes
_OURS = ("llama", "granitehybrid", "falcon-h1", "mamba", "mamba2")  # families that we know well enough to say so
_MOST_PARTS = 2**16 - 1  # llama.cpp's uint16


class Problem(NamedTuple):
    """text: a sentence; ends: whether llama.cpp ends at it, and loads nothing."""

    text: str
    ends: bool = True


def key_problems(path: Path, header: Header) -> Iterator[Problem]:
    """Keys that are missing, of another kind, or contradict each other; tokenizer traps that change the tokens."""
    keys = header.metadata
    wrong = [Problem(text, not text.startswith(_NOT_READ)) for text in wrong_kinds(keys)]
    yield from wrong
    if "general.architecture" not in keys:
        yield Problem("has no general.architecture, without which nothing loads it")
    if wrong:
        return
    if keys.get("split.count", 1) > _MOST_PARTS:
        yield Problem(f"split.count is {keys['split.count']}; expected at most {_MOST_PARTS}")
        return
    # os.path's exists is False also of too long a name
    missing = next((part for part in _other_parts(path, keys) if not os.path.exists(part)), None)
    if missing is not None:
        yield Problem(f"is a part of a split model; {missing.name} is not beside it")
    if is_model(keys) and not is_later_part(keys):
        family = keys.get("general.architecture")
        for name in _NEEDED if family in _OURS else ():
            if f"{family}.{name}" not in keys:
                yield Problem(f"has no {family}.{name}, without which llama.cpp does not load it")
        yield from _vocabulary(header)
        yield from _template(keys)


def is_model(keys: dict[str, Any]) -> bool:
    """Whether a file is a model, and not an adapter, a projector or statistics for one."""
    return keys.get("general.type", "model") == "model"


def is_later_part(keys: dict[str, Any]) -> bool:
    """A part of a split model after the first, which alone has the tokenizer."""
    return is_part(keys) and keys.get("split.no", 0) > 0


def _vocabulary(header: Header) -> Iterator[Problem]:
    keys = header.metadata
    model = keys.get("tokenizer.ggml.model")
    if model is None:
        yield Problem("has no tokenizer.ggml.model, without which llama.cpp does not load it")
        return
    tokens = keys.get("tokenizer.ggml.tokens")
    if model == "none":
        return
    if tokens is None:
        yield Problem("has no tokenizer.ggml.tokens")
        return
    rows = next((tensor.shape[-1] for tensor in header.tensors if tensor.name == "token_embd.weight"), None)
    if rows is not None and rows != len(tokens):
        yield Problem(f"has {len(tokens)} tokens, but token_embd.weight has {rows} rows; llama.cpp refuses that")
    types = keys.get("tokenizer.ggml.token_type")
    if types is not None and len(types) != len(tokens):
        yield Problem(f"has {len(tokens)} tokens and {len(types)} token types")
    if len(set(tokens)) != len(tokens):
        yield Problem("has a token twice, at which llama.cpp stops")
    if model == "gpt2":
        yield from _byte_level(keys)
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        index = keys.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            yield Problem(f"tokenizer.ggml.{name}_token_id is {index}, but there are {len(tokens)} tokens", index < 0)


def _byte_level(keys: dict[str, Any]) -> Iterator[Problem]:
    if not keys.get("tokenizer.ggml.merges"):
        yield Problem("has no tokenizer.ggml.merges, without which llama.cpp does not load it")
    if keys.get("tokenizer.ggml.pre") in (None, "", "default"):
        yield Problem(
            "does not say how text is split (tokenizer.ggml.pre): llama.cpp guesses, and makes other tokens than the model was trained on",
            False,
        )
    if keys.get("tokenizer.ggml.eos_token_id") is None:
        yield Problem(f"names no end token: llama.cpp takes the token {NO_END}", False)


def _template(keys: dict[str, Any]) -> Iterator[Problem]:
    template = keys.get("tokenizer.chat_template")
    if template is None:
        return
    fault = fault_of_template(template)
    if fault is not None:
        yield Problem(f"its chat template is damaged ({fault}): llama.cpp's server does not load it")


def key_notes(header: Header) -> Iterator[str]:
    """What is no fault and good to know."""
    keys = header.metadata
    if list(wrong_kinds(keys)):
        return
    if not is_model(keys):
        yield f"is no model by itself: its general.type is {keys['general.type']!r}"
        return
    if is_part(keys):
        yield (
            f"is part {keys.get('split.no', 0) + 1} of {keys['split.count']} of a split model; llama.cpp loads the first with the others "
            "beside it, our commands one file (llama-gguf-split --merge FIRST OUT)"
        )
    if is_later_part(keys):
        return
    if keys.get("tokenizer.ggml.model") == "none":
        yield "has no tokenizer; llama.cpp's server does not run it (tmexport gguf --no-tokenizer writes one that it runs)"
    elif "tokenizer.chat_template" not in keys:
        yield "has no chat template"


def _other_parts(path: Path, keys: dict[str, Any]) -> Iterator[Path]:
    """As llama.cpp names them: NAME-00001-of-00003.gguf."""
    if not is_part(keys):
        return
    count = keys["split.count"]
    end = f"-of-{count:05d}.gguf"
    stem = path.name.removesuffix(end)[:-6] if path.name.endswith(end) else path.stem
    yield from (path.with_name(f"{stem}-{i + 1:05d}{end}") for i in range(count) if i != keys.get("split.no", 0))
