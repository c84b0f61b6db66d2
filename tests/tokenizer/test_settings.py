"""What lies beside a tokenizer.json: where transformers follows it and an exported file cannot, the user is told."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.models import train_tokenizer
from tmexport.errors import TokenizerError
from tmexport.model import mamba2_model
from tmexport.tokenizer.gguf import export_tokenizer
from tmexport.tokenizer.parse import parse_tokenizer

MODEL = mamba2_model(256, 1, 512, d_state=64)
MARK = {
    "content": "<mark>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
KNOWN = {"id": 500, **MARK}
TEXT = "the union <mark> of<mark>the <|endoftext|> states"
END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}

# name: (tokenizer_config.json, added tokens of tokenizer.json, what the warning says)
CASES = {
    "nothing": ({}, [], None),
    "the same token": ({"added_tokens_decoder": {"500": MARK}}, [KNOWN], None),
    "another token": ({"added_tokens_decoder": {"500": MARK}}, [], "has the added token '<mark>', and tokenizer.json does not"),
    "a list": ({"additional_special_tokens": ["<mark>"]}, [], "has the added token '<mark>'"),
    "two": ({"additional_special_tokens": ["<mark>", "<b>"]}, [], "has the added token '<mark>' (and 1 more)"),
    "a named one": ({"pad_token": "<mark>"}, [], "has the added token '<mark>'"),
    "lstrip": ({"added_tokens_decoder": {"500": MARK | {"lstrip": True}}}, [KNOWN], "gives '<mark>' the flag lstrip"),
    "rstrip": ({"added_tokens_decoder": {"500": MARK | {"rstrip": True}}}, [KNOWN], "gives '<mark>' the flag rstrip"),
    "a space": ({"add_prefix_space": True}, [], "has add_prefix_space"),
    "no space": ({"add_prefix_space": False, "add_bos_token": False}, [], None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_warning_wherever_transformers_makes_other_tokens(tmp_path, name):
    settings, added, said = CASES[name]
    path = train_tokenizer(tmp_path / "tokenizer.json", 500)
    raw = json.loads(path.read_text())
    raw["added_tokens"] += [entry | {"id": len(raw["model"]["vocab"])} for entry in added]
    path.write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"} | END | settings))
    warnings = export_tokenizer(path, MODEL).warnings
    theirs = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert (theirs == Tokenizer.from_file(str(path)).encode(TEXT).ids) == (said is None)
    assert len(warnings) == (said is not None)
    assert said is None or f"tokenizer_config.json {said}" in warnings[0]


def test_a_token_that_only_transformers_4_adds(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(END | {"add_bos_token": True}))
    (said,) = export_tokenizer(path, MODEL).warnings
    assert "has add_bos_token, but tokenizer.json has no template that adds it" in said


def test_the_end_token_of_an_older_folder(tmp_path):
    """special_tokens_map.json, where tokenizer_config.json does not say it and the model neither."""
    path = train_tokenizer(tmp_path / "tokenizer.json", 500)
    raw = json.loads(path.read_text())
    raw["added_tokens"].append(KNOWN | {"id": len(raw["model"]["vocab"])})
    path.write_text(json.dumps(raw))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": MARK}))
    metadata = export_tokenizer(path, MODEL).metadata
    assert metadata["tokenizer.ggml.eos_token_id"] == len(raw["model"]["vocab"])


def test_templates_in_a_folder_of_their_own(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{{ a }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ b }}")
    metadata = export_tokenizer(path, MODEL).metadata
    found = {key: value for key, value in metadata.items() if "chat_template" in key}
    assert found == {"tokenizer.chat_template": "{{ a }}", "tokenizer.chat_template.rag": "{{ b }}", "tokenizer.chat_templates": ["rag"]}  # fmt: skip


def test_an_end_token_beyond_the_model(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9999]}))
    exported = export_tokenizer(path, MODEL)
    assert exported.warnings == ("the end token 9999 is left out; the model has 512 embeddings",)
    assert exported.metadata["tokenizer.ggml.eos_token_id"] == 0


def test_a_file_from_before_models_named_their_type(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    wanted = export_tokenizer(path, MODEL).metadata
    raw = json.loads(path.read_text())
    del raw["model"]["type"]
    path.write_text(json.dumps(raw))
    found = export_tokenizer(path, MODEL).metadata
    assert {k: v for k, v in found.items() if "json" not in k} == {k: v for k, v in wanted.items() if "json" not in k}


def test_a_panic_of_the_library_is_our_error_and_nothing_else(tmp_path, capfd, monkeypatch):
    raw = json.loads(train_tokenizer(tmp_path / "tokenizer.json").read_text())
    raw["model"]["continuing_subword_prefix"] = "##"
    with monkeypatch.context() as machine:
        machine.setattr("tempfile.tempdir", "/no-such-folder")  # nothing can be written
        with pytest.raises(
            TokenizerError, match="is not a tokenizer.json the tokenizers library can load: slice index"
        ):
            parse_tokenizer(json.dumps(raw), "t.json")
    assert capfd.readouterr() == ("", "")
