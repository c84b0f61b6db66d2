"""Random tokenizer.json features, and the rule: what exports without a warning gives llama.cpp's tokens on every text."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

from tests.tokenizer.samples import SCRIPTS
from tmexport.errors import TokenizerError
from tmexport.model import mamba2_model
from tmexport.tokenizer.gguf import CONTROL, NORMAL, ExportedTokenizer, export_tokenizer
from tmexport.tokenizer.parse import parse_tokenizer
from tmexport.tokenizer.splits import LLAMA3, QWEN2
from tmexport.tokenizer.texts import LlamaTokenizer, first_difference

ROWS = 700
_PIECES = [
    "a",
    "b",
    "ab",
    "river",
    " ",
    "  ",
    "    ",
    "\n",
    "\n\n",
    "\t",
    "<",
    ">",
    "|",
    "mark",
    "é",
    "中",
    "🚀",
    "1",
    "12",
    "'s",
    "Ġ",
    "Ġriver",
    ".",
]
_NAMES = [
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<s>",
    "[PAD]",
    "[PAD600]",
    "<|fim_pad|>",
    "<|channel|>",
    "<unused1>",
]


@functools.cache
def trained(seed: int) -> str:
    """A BPE of this seed's size, trained on the scripts; one in four lacks bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if seed % 4 else []
    trainer = trainers.BpeTrainer(
        vocab_size=rng.randint(300, 640),
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(rng.sample(SCRIPTS, 12), trainer)
    return tokenizer.to_str()


def random_tokenizer(rng: random.Random) -> dict[str, Any]:
    """A tokenizer.json with features drawn at random, most of them harmless."""
    raw = json.loads(trained(rng.randrange(8)))
    model = raw["model"]
    kind = rng.choice(["gpt2", "digits", LLAMA3, QWEN2])
    raw["pre_tokenizer"] = _pre_tokenizer(rng, kind)
    model["ignore_merges"] = rng.random() < (0.6 if kind == LLAMA3 else 0.05)
    model["fuse_unk"] = rng.random() < 0.2
    raw["post_processor"] = _post_processor(rng)
    if rng.random() < 0.3:
        model["dropout"] = rng.choice([0.1, 0.9])
    if rng.random() < 0.06:
        model[rng.choice(["unk_token", "continuing_subword_prefix", "end_of_word_suffix"])] = rng.choice(["", "<|endoftext|>"])  # fmt: skip
    if rng.random() < 0.1:
        raw["normalizer"] = rng.choice([{"type": "NFC"}, {"type": "NFKC"}, {"type": "Sequence", "normalizers": []}])
    if rng.random() < 0.2:
        raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    if rng.random() < 0.1:
        _whole_word(rng, model)
    if rng.random() < 0.05:
        model["merges"].append(model["merges"][0])
    for _ in range(rng.choice([0, 0, 1, 2, 4, 8])):
        _add(rng, raw)
    return raw


def _pre_tokenizer(rng: random.Random, kind: str) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": rng.random() < 0.03, "trim_offsets": rng.random() < 0.5}
    byte_level["use_regex"] = kind in ("gpt2", "digits")
    if kind == "gpt2":
        return byte_level
    if kind == "digits":
        first = {"type": "Digits", "individual_digits": rng.random() < 0.9}
    else:
        behavior, invert = rng.choice(
            [("Isolated", False), ("Isolated", False), ("Removed", True), ("MergedWithNext", False)]
        )
        first = {"type": "Split", "pattern": {"Regex": kind}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [first, byte_level]}


def _post_processor(rng: random.Random) -> dict[str, Any] | None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    end, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    single = rng.choice([[end, text], [text, end], [end, text, end], [text], [end, end, text]])
    template = {"type": "TemplateProcessing", "single": single, "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}  # fmt: skip
    return rng.choice([None, None, byte_level, template, {"type": "Sequence", "processors": [byte_level, template]}])


def _whole_word(rng: random.Random, model: dict[str, Any]) -> None:
    """A token that no merge makes."""
    word = rng.choice(["Ġzqxj", "qqq", "12345", "Ċ", "..!", *_NAMES])
    model["vocab"].setdefault(word, max(model["vocab"].values()) + 1)


def _add(rng: random.Random, raw: dict[str, Any]) -> None:
    content = rng.choice([rng.choice(_NAMES), "".join(rng.choices(_PIECES, k=rng.randint(1, 3)))])
    vocabulary, added = raw["model"]["vocab"], raw["added_tokens"]
    if any(entry["content"] == content for entry in added):
        return
    following = max(max(vocabulary.values()), max(entry["id"] for entry in added)) + 1
    entry = {
        "id": vocabulary.get(content, following),
        "content": content,
        "normalized": rng.random() < 0.3,
        "special": rng.random() < 0.5,
    }
    added.append(entry | {flag: rng.random() < 0.02 for flag in ("single_word", "lstrip", "rstrip")})


def random_text(rng: random.Random, raw: dict[str, Any]) -> str:
    """Words, added tokens, pieces of both, and whitespace, in any order."""
    added = [entry["content"] for entry in raw["added_tokens"]]
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if kind < 0.3:
            script = rng.choice(SCRIPTS)
            at = rng.randrange(len(script))
            parts.append(script[at : at + rng.randint(1, 20)])
        elif kind < 0.6:
            token = rng.choice(added)
            at = rng.randrange(len(token))
            parts.append(token if rng.random() < 0.7 else token[at:])
        else:
            parts.append(rng.choice(_PIECES))
    return "".join(parts)


def check(seed: int, folder: Path, texts: int = 24) -> tuple[str, str]:
    """("refused", why), ("warned", what), ("equal", "") or ("DIFFERENT", how): the last one breaks the rule."""
    rng = random.Random(seed)
    raw = random_tokenizer(rng)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(raw, ensure_ascii=rng.random() < 0.5), encoding="utf-8")
    try:
        exported = export_tokenizer(path, mamba2_model(d_model=64, n_layer=1, vocab_size=ROWS, eos_token_id=0))
    except TokenizerError as error:
        return "refused", str(error)
    warnings = [text for text in exported.warnings if "U+017F" not in text]
    if warnings:
        return "warned", warnings[0]
    tokenizer = parse_tokenizer(exported.text, "exported")
    samples = [random_text(rng, raw) for _ in range(texts)]
    if len(exported.warnings) > len(warnings):
        samples = [text.replace("\u017f", "s") for text in samples]
    with LlamaTokenizer(exported.metadata) as llama:
        for special in (False, True):
            found = first_difference(
                samples,
                lambda text, special=special: tokenizer.encode(text, add_special_tokens=special).ids,
                lambda text, special=special: llama.tokenize(text, special),
            )
            if found is not None:
                return "DIFFERENT", f"{found} (whole text: {samples[found.text]!r}, add_special {special})"
    odd = written_otherwise(exported)
    return ("DIFFERENT", f"text of the tokens {odd[:3]}") if odd else ("equal", "")


def written_otherwise(exported: ExportedTokenizer) -> list[tuple[int, str, str]]:
    """(id, text, llama.cpp's text) of the tokens that both show and write differently; each between two letters."""
    tokenizer = parse_tokenizer(exported.text, "exported")
    types = exported.metadata["tokenizer.ggml.token_type"]
    shown = [i for i, kind in enumerate(types) if kind != CONTROL]
    letter = next(i for i in shown if types[i] == NORMAL and (tokenizer.id_to_token(i) or "").isalpha())
    with LlamaTokenizer(exported.metadata) as llama:

        def texts(ids: list[int]) -> tuple[str, str]:
            between = [token for i in ids for token in (letter, i, letter)]
            return tokenizer.decode(between), llama._ask("/detokenize", {"tokens": between})["content"]

        ours, theirs = texts(shown)
        return [] if ours == theirs else [(i, *pair) for i in shown if (pair := texts([i]))[0] != pair[1]]
