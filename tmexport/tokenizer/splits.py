"""The ways of splitting a text before the merges that llama.cpp has a name for (llama.cpp, src/llama-vocab.cpp).

A way is a list of steps. They are recognised by what tokenizer.json says, not by a hash of known models, so a tokenizer
trained yesterday exports too. Each was compared with llama.cpp's own on texts in 20 scripts (tests/tokenizer).
"""

from __future__ import annotations

from typing import Any

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = frozenset({LLAMA3, QWEN2})  # the only expressions that may run on what a user types
GPT2 = "GPT-2"  # ByteLevel's own expression, which tokenizer.json does not spell
DIGITS = "digits"  # every digit alone

Steps = tuple[str, ...]
# (steps, ignore_merges) -> the name that is written
NAMES: dict[tuple[Steps, bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
}
# Other names of the same ways, as files of other programs have them.
_ALIASES = {
    "gpt-2": ("olmo", "phi-2", "mpt", "jais", "trillion", "gigachat", "modern-bert", "a.x-4.0", "mellum"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "glm4"),
    "smaug-bpe": ("dbrx", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo"),
}
BY_NAME = {name: way for way, name in NAMES.items()}
BY_NAME |= {alias: BY_NAME[name] for name, aliases in _ALIASES.items() for alias in aliases}

_BYTE_LEVEL = {"add_prefix_space", "trim_offsets", "use_regex"}
_SPLIT = {"pattern", "behavior", "invert"}


def steps_of(pre_tokenizer: Any) -> Steps | str:
    """The steps of a pre_tokenizer, or else, as a sentence's end, why llama.cpp has no name for it."""
    parts = _flat(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel" or _count(parts, "ByteLevel") != 1 or parts[-1].get("add_prefix_space"):  # fmt: skip
        return "expected one ByteLevel pre-tokenizer that adds no space; llama.cpp has no name for another"
    steps = []
    for part in parts[:-1]:
        step = _step(part)
        if step is None:
            return _nameless(pre_tokenizer)
        steps.append(step)
    unknown = set(parts[-1]) - _BYTE_LEVEL - {"type"}
    if unknown:
        return f"has a ByteLevel with the field {min(unknown)!r}, which this release does not know"
    if parts[-1].get("use_regex", True) is True:
        steps.append(GPT2)
    way = tuple(steps)
    return way if any(way == known for known, _ in NAMES) else _nameless(pre_tokenizer)


def as_json(steps: Steps) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json that takes these steps."""
    parts: list[dict[str, Any]] = []
    for step in steps:
        if step == DIGITS:
            parts.append({"type": "Digits", "individual_digits": True})
        elif step != GPT2:
            parts.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    parts.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": steps[-1] == GPT2})
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def _flat(part: Any) -> list[dict[str, Any]]:
    if not isinstance(part, dict):
        return []
    if part.get("type") == "Sequence" and set(part) <= {"type", "pretokenizers"}:
        inner = part.get("pretokenizers")
        return [p for item in inner for p in _flat(item)] if isinstance(inner, list) else []
    return [part]


def _count(parts: list[dict[str, Any]], kind: str) -> int:
    return sum(part.get("type") == kind for part in parts)


def _step(part: dict[str, Any]) -> str | None:
    if part.get("type") == "Digits" and set(part) == {"type", "individual_digits"}:
        return DIGITS if part["individual_digits"] is True else None
    pattern = part.get("pattern")
    if part.get("type") != "Split" or not set(part) <= _SPLIT | {"type"} or not isinstance(pattern, dict):
        return None
    # Removing what does not match leaves what Isolated leaves: these expressions match every character.
    ways = (("Isolated", False), ("Removed", True))
    expression = pattern.get("Regex") if set(pattern) == {"Regex"} else None
    return expression if expression in PATTERNS and (part.get("behavior"), part.get("invert", False)) in ways else None


def _nameless(pre_tokenizer: Any) -> str:
    import json

    return (
        f"splits text in a way llama.cpp has no name for ({json.dumps(pre_tokenizer)[:200]}); "
        "expected GPT-2's, GPT-NeoX's, Llama 3's, Qwen 2's or SmolLM's"
    )
