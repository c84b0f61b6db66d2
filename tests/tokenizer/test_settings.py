"""What lies beside a tokenizer.json: where transformers follows it and an exported file cannot, the user is told."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.models import train_tokenizer
from tmexport.errors import TmexportError, TokenizerError
from tmexport.model import mamba2_model
from tmexport.tokenizer.gguf import export_tokenizer, stop_ids
from tmexport.tokenizer.parse import parse_tokenizer
from tmexport.tokenizer.texts import LlamaTokenizer

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

# of a tokenizer_config.json that lists its tokens, and of the files that counted before there was one
LISTED = {"added_tokens_decoder": {"0": MARK | {"content": "<|endoftext|>"}}}
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
    "special tokens are words": ({"split_special_tokens": True}, [], "has split_special_tokens"),
    "not words": ({"split_special_tokens": False}, [], None),
}  # fmt: skip
OLDER = {
    "special_tokens_map.json": {"additional_special_tokens": ["<mark>"]},
    "added_tokens.json": {"<mark>": 500},
}


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
    assert said is None or (said in warnings[0] and warnings[0].startswith("tokenizer_config.json"))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("file", OLDER)
def test_the_files_of_before_count_where_transformers_reads_them(tmp_path, file, listed):
    path = train_tokenizer(tmp_path / "tokenizer.json", 500)
    settings = {"tokenizer_class": "GPT2Tokenizer"} | END | (LISTED if listed else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / file).write_text(json.dumps(OLDER[file]))
    theirs = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    differs = theirs != Tokenizer.from_file(str(path)).encode(TEXT).ids
    assert differs is not listed
    assert ["'<mark>'" in warning for warning in export_tokenizer(path, MODEL).warnings] == [True] * differs


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


NAMED = [{"name": "default", "template": "{{ a }}"}, {"name": "rag", "template": "{{ r }}"}]
# name: (chat_template of tokenizer_config.json, files)
TEMPLATES = {
    "a text": ("{{ a }}", {}),
    "a list": (NAMED, {}),
    "an object": ({"default": "{{ a }}", "rag": "{{ r }}"}, {}),
    "no default": (NAMED[1:], {}),
    "a file": (None, {"chat_template.jinja": "{{ b }}"}),
    "a file before the list": (NAMED, {"chat_template.jinja": "{{ b }}"}),
    "another system's lines": (None, {"chat_template.jinja": "{{ b }}\r\n{{ c }}\r\n"}),
    "an old system's lines": (None, {"chat_template.jinja": "{{ b }}\r{{ c }}\r\r\n"}),
    "a folder": (None, {"additional_chat_templates/rag.jinja": "{{ r }}"}),
    "a folder before the list": (NAMED, {"additional_chat_templates/rag.jinja": "{{ q }}"}),
    "the default in the folder": ("{{ a }}", {"additional_chat_templates/default.jinja": "{{ d }}"}),
    "a file and a folder": (None, {"chat_template.jinja": "{{ b }}", "additional_chat_templates/rag.jinja": "{{ r }}"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_found_where_transformers_finds_them(tmp_path, name):
    setting, files = TEMPLATES[name]
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(END | {"tokenizer_class": "GPT2Tokenizer", "chat_template": setting}))  # fmt: skip
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(text.encode())
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    theirs = theirs if isinstance(theirs, dict) else {"default": theirs}
    metadata = export_tokenizer(path, MODEL).metadata
    names = {key: key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default" for key in metadata if "chat_template" in key}  # fmt: skip
    assert {names[key]: metadata[key] for key in names if key != "tokenizer.chat_templates"} == theirs
    assert metadata.get("tokenizer.chat_templates", []) == [name for name in theirs if name != "default"]


@pytest.mark.parametrize(
    "value", [7, [7], [{"name": "x"}], [{"name": ["x"], "template": "a"}], {"default": None}, "\ud800"]
)
def test_a_template_that_is_none(tmp_path, value):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(TokenizerError, match="chat_template is neither a text nor a list|half of a surrogate pair"):
        export_tokenizer(path, MODEL)


@pytest.mark.parametrize("index", [[5], {"id": 5}, "5", None, True])
def test_an_added_token_whose_id_is_no_number(tmp_path, index):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mark>": index}))
    with pytest.raises(TokenizerError, match="the id of '<mark>' is .*; expected a whole number"):
        export_tokenizer(path, MODEL)


def test_a_damaged_template_is_a_warning_and_llamacpp_refuses_it(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    exported = export_tokenizer(path, MODEL)
    assert exported.warnings[0].startswith("the chat template is damaged (TemplateSyntaxError")
    with pytest.raises(TmexportError, match="does not load"):
        LlamaTokenizer(exported.metadata)


def test_an_end_token_beyond_the_model(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9999]}))
    exported = export_tokenizer(path, MODEL)
    assert exported.warnings == ("the end token 9999 is left out; the model has 512 embeddings",)
    assert exported.metadata["tokenizer.ggml.eos_token_id"] == 0


def test_an_end_token_said_twice_takes_no_room(tmp_path):
    path = train_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 5, 0, 6, 5], "stop_strings": "\n\n"})
    )
    exported = export_tokenizer(path, mamba2_model(256, 1, 512, d_state=64, eos_token_id=0))
    assert stop_ids(exported.metadata) == (0, 5, 6)
    assert exported.warnings == (
        "generation_config.json ends a generation at the text '\\n\\n', which a GGUF cannot hold: it goes on there",
    )


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
