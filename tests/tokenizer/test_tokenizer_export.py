"""Tokenizers that GGUF can hold, and those it cannot."""

import json

import pytest
from tokenizers import Tokenizer, models

from tests.models import train_tokenizer
from tmexport.errors import TokenizerError
from tmexport.model import mamba2_model
from tmexport.tokenizer.gguf import CONTROL, NORMAL, UNUSED, USER_DEFINED, export_tokenizer

CONFIG = mamba2_model(256, 1, 512, d_state=64)


def edited(path, change):
    train_tokenizer(path)
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def test_tokens_types_and_merges(tmp_path):
    def add_tokens(raw):
        common = {"single_word": False, "lstrip": False, "rstrip": False}
        raw["added_tokens"].append({"id": 500, "content": "    ", "normalized": True, "special": False} | common)

    path = edited(tmp_path / "tokenizer.json", add_tokens)
    metadata, tokenizer = export_tokenizer(path, CONFIG).metadata, Tokenizer.from_file(str(path))
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 512
    for index in range(500):
        assert tokens[index] == tokenizer.id_to_token(index)
    assert (types[0], types[1], types[500], types[511]) == (CONTROL, NORMAL, USER_DEFINED, UNUSED)
    assert tokens[511] == "[PAD511]"
    assert metadata["tokenizer.ggml.merges"][0] == " ".join(json.loads(path.read_text())["model"]["merges"][0])
    assert metadata["tokenizer.ggml.eos_token_id"] == 0
    assert metadata["tokenizer.huggingface.json"] == path.read_text()


def test_gpt_neox_is_called_olmo(tmp_path):
    def as_neox(raw):
        old = next(token for token, index in raw["model"]["vocab"].items() if index == 1)
        raw["model"]["vocab"]["<|padding|>"] = 1
        raw["model"]["vocab"][old] = 510
        raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 1, "content": "<|padding|>"})
        raw["normalizer"] = {"type": "NFC"}

    assert export_tokenizer(edited(tmp_path / "t.json", as_neox), CONFIG).metadata["tokenizer.ggml.pre"] == "olmo"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}),
            "of type .Whitespace.; expected a byte-level BPE",
        ),
        (lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True), "adds no space"),
        (lambda raw: raw["pre_tokenizer"].update(use_regex=False), "no name for"),
        (lambda raw: raw["added_tokens"][0].update(id=700), "the ids 0 and 700"),
        (lambda raw: raw.pop("model"), "can load"),
    ],
)
def test_what_llamacpp_could_not_split_the_same_way_is_refused(tmp_path, change, message):
    with pytest.raises(TokenizerError, match=message):
        export_tokenizer(edited(tmp_path / "t.json", change), CONFIG)


def test_a_unigram_model_is_refused(tmp_path):
    Tokenizer(models.Unigram([("a", 0.0)])).save(str(tmp_path / "t.json"))
    with pytest.raises(TokenizerError, match="of type 'Unigram'; expected a byte-level BPE"):
        export_tokenizer(tmp_path / "t.json", CONFIG)
