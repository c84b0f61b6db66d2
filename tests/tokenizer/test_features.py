"""What a tokenizer.json says, field by field: carried over, neutralised, warned about, or refused."""

import json

import pytest
from tokenizers import Tokenizer

from tests.models import train_tokenizer
from tests.tokenizer.random_features import written_otherwise
from tmexport.errors import TokenizerError
from tmexport.model import mamba2_model
from tmexport.tokenizer.features import _ADDED, _FILE, _MODEL
from tmexport.tokenizer.gguf import export_tokenizer, stop_ids
from tmexport.tokenizer.names import harmless_name

CONFIG = mamba2_model(256, 1, 512, d_state=64)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
END, TEXT = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}


def template(*single):
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    return {"type": "TemplateProcessing", "single": list(single), "pair": [TEXT, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": special}  # fmt: skip


def stands_for(token, index):
    found = template(END, TEXT)
    found["special_tokens"]["<|endoftext|>"] |= {"ids": [index], "tokens": [token]}
    return found


def export(folder, change=lambda raw: None, config=CONFIG):
    path = train_tokenizer(folder / "tokenizer.json")
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return export_tokenizer(path, config)


def added(**flags):
    entry = {"id": 500, "content": "<mark>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # fmt: skip
    return lambda raw: raw["added_tokens"].append(entry | flags)


def test_the_tables_hold_every_field_that_the_tokenizers_library_writes(tmp_path):
    raw = json.loads(train_tokenizer(tmp_path / "t.json").read_text())
    assert set(raw) == set(_FILE)
    assert set(raw["model"]) == set(_MODEL)
    assert set(raw["added_tokens"][0]) == set(_ADDED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (added(lstrip=True), "lstrip 'True'"),
        (added(rstrip=True), "rstrip 'True'"),
        (added(single_word=True), "single_word 'True'"),
        (added(new_flag=False), "'<mark>' has the field 'new_flag', which this release does not know"),
        (lambda raw: raw.update(normalizer={"type": "NFKC"}), "normalizer 'NFKC'"),
        (lambda raw: raw["model"].update(end_of_word_suffix="!"), "end_of_word_suffix|cannot|can load"),
        (lambda raw: raw["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda raw: raw["model"].update(ignore_merges=True), "llama.cpp does the opposite"),
        (lambda raw: raw.update(post_processor=template(END, END, TEXT)), "at most one token before the text"),
        (lambda raw: raw["model"]["merges"].append(raw["model"]["merges"][0]), "twice"),
        (lambda raw: raw.update(post_processor=template(END, {"Sequence": {"id": "B", "type_id": 0}})), "fails at any text with it"),
        (lambda raw: raw.update(post_processor=stands_for("<|endoftext|>", 7)), "gives '<|endoftext|>' the id 7; the vocabulary gives it 0"),
        (lambda raw: raw.update(post_processor=stands_for("<s>", 700)), "gives '<s>' the id 700; the vocabulary gives it None"),
        (added(id=505), "expected ids without a gap"),
        (added(content="a\0b"), "a GGUF cannot hold it"),
        (lambda raw: raw.update(decoder={"type": "Sequence", "decoders": []}), "the file has decoder ''; expected ByteLevel"),
        (lambda raw: raw.update(decoder={"type": "Sequence", "decoders": [BYTE_LEVEL, BYTE_LEVEL]}), "decoder 'ByteLevel and ByteLevel'"),
    ],
)  # fmt: skip
def test_what_a_gguf_cannot_say_is_refused(tmp_path, change, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        export(tmp_path, change)
    assert "--no-tokenizer" in str(caught.value)


def test_dropout_truncation_and_padding_are_left_out(tmp_path):
    def change(raw):
        raw["model"]["dropout"] = 0.5
        raw["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}

    exported = export(tmp_path, change)
    raw = json.loads(exported.text)
    assert (raw["model"]["dropout"], raw["truncation"]) == (None, None)
    assert exported.neutralised == ("truncation", "dropout")
    plain = Tokenizer.from_file(str(train_tokenizer(tmp_path / "plain.json")))
    text = "The state of the union is strong, fellow citizens."
    assert {tuple(Tokenizer.from_str(exported.text).encode(text).ids) for _ in range(10)} == {tuple(plain.encode(text).ids)}  # fmt: skip


def test_a_text_without_anything_to_neutralise_is_kept_to_the_byte(tmp_path):
    path = train_tokenizer(tmp_path / "t.json")
    assert export_tokenizer(path, CONFIG).text == path.read_text(encoding="utf-8")


def test_a_bos_of_the_post_processor_is_carried_over(tmp_path):
    sequence = {"type": "Sequence", "processors": [BYTE_LEVEL, template(END, TEXT)]}
    metadata = export(tmp_path, lambda raw: raw.update(post_processor=sequence)).metadata
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.bos_token_id"]) == (True, 0)
    assert "tokenizer.ggml.add_eos_token" not in metadata


def test_nfc_is_a_warning_with_a_text_that_differs(tmp_path):
    exported = export(tmp_path, lambda raw: raw.update(normalizer={"type": "NFC"}))
    assert "cafe\\u0301" in exported.warnings[0]
    plain = Tokenizer.from_file(str(train_tokenizer(tmp_path / "plain.json")))
    assert Tokenizer.from_str(exported.text).encode("cafe\u0301").ids != plain.encode("cafe\u0301").ids


def test_added_tokens_that_overlap_are_a_warning(tmp_path):
    def change(raw):
        added(content="q~")(raw)
        added(content="~qqq", id=501)(raw)

    warning = export(tmp_path, change).warnings[0]
    assert "in 'q~qqq' the tokenizer takes 'q~', llama.cpp '~qqq'" in warning


def spelled(content):
    return lambda raw: raw["model"]["vocab"].update({content: 500})


def kept(content, **flags):
    """An added token that is one of the vocabulary's."""
    return lambda raw: added(content=content, id=raw["model"]["vocab"][content], **flags)(raw)


ODD = {
    "nothing": (lambda raw: None, False),
    "a word": (spelled("zqx"), False),
    "a word in characters": (spelled("中"), True),
    "a space": (spelled("a b"), True),
    "no text": (spelled(""), True),
    "an added one": (added(content="中", special=False), False),
    "an added one, ascii": (kept("e", special=False), False),
    "an added one of bytes": (kept("Ġ", special=False), True),
    "a special one of bytes": (kept("Ġ"), False),
}


@pytest.mark.parametrize("name", ODD)
def test_a_token_that_llamacpp_writes_otherwise_is_a_warning(tmp_path, name):
    """Every token that both show, between two letters: the library's text and llama.cpp's."""
    change, warned = ODD[name]
    exported = export(tmp_path, change)
    assert ["is not spelled as the other tokens are" in w for w in exported.warnings] == [True] * warned
    assert bool(written_otherwise(exported)) is warned


def test_end_tokens_and_templates_beside_it(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5, 6, 500]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    metadata = export(tmp_path, added(content="<|im_end|>")).metadata
    ends = [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")]
    assert ends == [0, 5, 6]  # <|im_end|> is known by its name
    assert stop_ids(metadata) == (0, 5, 6, 500)
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"
    (tmp_path / "chat_template.jinja").write_text("{{ other }}")
    assert export(tmp_path).metadata["tokenizer.chat_template"] == "{{ other }}"


def test_a_name_for_which_llamacpp_would_strip_spaces_is_written_otherwise():
    assert harmless_name("my-Phi3-mini") == "my-phi 3-mini"
    assert harmless_name("mamba2-1.3b") == "mamba2-1.3b"
