"""config.json and tokenizer.json with absurd, missing and contradictory values."""

from __future__ import annotations

import json
import time

import pytest

from tests.hostile.builders import CONFIG, checkpoint, dense_config, tokenizer_json
from tests.hostile.targets import TOKENIZER_MODEL, peak_bytes, read_checkpoint
from tmexport.errors import ConfigError, TmexportError, TokenizerError
from tmexport.model import load_config
from tmexport.tokenizer.gguf import export_tokenizer
from tmexport.tokenizer.parse import parse_tokenizer

HUGE = 10**4000


def config_refused(folder, text: str | bytes, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(TmexportError, match=message) as caught:
        load_config(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_dimension_that_is_missing(tmp_path, name):
    config_refused(
        tmp_path, json.dumps({k: v for k, v in CONFIG.items() if k != name}), rf"{name} is missing|model_type"
    )


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "state_size", "conv_kernel", "expand", "head_dim", "n_groups"])  # fmt: skip
@pytest.mark.parametrize(
    "value", [0, -1, 1.5, 64.0, "64", None, True, [64], {}, 2**24 + 1, 2**63, 2**64, HUGE], ids=str
)
def test_a_dimension_that_is_absurd(tmp_path, name, value):
    ours = {"hidden_size": "d_model", "num_hidden_layers": "n_layer", "vocab_size": "vocab_size", "state_size": "d_state",
            "conv_kernel": "d_conv", "expand": "expand", "head_dim": "headdim", "n_groups": "n_groups"}[name]  # fmt: skip
    config_refused(
        tmp_path,
        json.dumps(CONFIG | {name: value}),
        rf"config.json: {ours} is .*; expected a whole number from [12] to \d+",
    )


def test_dimensions_are_refused_before_they_are_used(tmp_path):
    """A list of the tensors of 16 million layers would take 26 GB."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 2**24}))

    def load():
        with pytest.raises(ConfigError, match="n_layer is 16777216; expected a whole number from 1 to 1024"):
            load_config(tmp_path)

    assert peak_bytes(load) < 2**20
    folder = checkpoint(tmp_path / "deep", CONFIG | {"num_hidden_layers": 1024})
    with pytest.raises(TmexportError, match="backbone.layers.1.norm.weight is missing"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 65}, "d_inner 65 is not a multiple of headdim 64"),
        ({"n_groups": 3}, "1 heads cannot be shared by 3 groups"),
        ({"num_heads": 2}, r"num_heads is 2, but expand \* hidden_size / head_dim is 1; expected them to agree"),
        ({"num_heads": "1"}, "num_heads is '1'"),
        ({"conv_kernel": 1}, "d_conv is 1; expected a whole number from 2 to"),
        ({"layer_norm_epsilon": 0}, "epsilon is 0.0"),
        ({"layer_norm_epsilon": -1e-5}, "epsilon is -1e-05"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; expected a finite number"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        ({"layer_norm_epsilon": HUGE}, "layer_norm_epsilon is a whole number of 13288 bits; expected a finite number"),
        ({"layer_norm_epsilon": None}, "layer_norm_epsilon is None"),
        ({"tie_word_embeddings": "false"}, "tied embeddings are 'false'; expected true or false"),
        ({"tie_word_embeddings": 1}, "tied embeddings are 1"),
        ({"bos_token_id": 16}, "bos_token_id is 16; expected a token id below the vocabulary of 16"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
        ({"eos_token_id": [16]}, "eos_token_id is 16"),
        ({"eos_token_id": [[0]]}, r"eos_token_id is \[0\]"),
        ({"eos_token_id": "0"}, "eos_token_id is '0'"),
        ({"use_bias": True}, "use_bias is True; only False can be represented"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({"time_step_limit": [0.001, 0.1]}, r"dt is clamped to \[0.001, 0.1\]"),
        ({"time_step_limit": [0, HUGE]}, "dt is clamped"),
        ({"time_step_limit": "inf"}, "dt is clamped to 'inf'"),
        ({"time_step_limit": [0, [1]]}, "dt is clamped"),
        ({"hidden_size": {"\n": "\x1b[2J"}}, "d_model is"), ({"model_type": "\n\x1b[2J"}, "another type: model_type is"),
    ],
    ids=str,
)  # fmt: skip
def test_values_that_contradict(tmp_path, changes, message):
    config_refused(tmp_path, json.dumps(CONFIG | changes), message)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("ternary", "quantization_config is 'ternary'"), ([], r"quantization_config is \[\]"), ({}, "expected none, or quant_method 'ternary'"),
        ({"quant_method": "gptq", "group_size": 64, "version": 1}, "quant_method 'ternary'"),
        ({"quant_method": "ternary", "group_size": 64}, "version None; this release reads 1; install a newer tmexport"),
        ({"quant_method": "ternary", "group_size": 64, "version": 2}, "version 2; this release reads 1"),
        ({"quant_method": "ternary", "group_size": 64, "version": "1"}, "version '1'"),
        ({"quant_method": "ternary", "group_size": 32, "version": 1}, "group_size is 32; expected 64, 128 or 256"),
        ({"quant_method": "ternary", "group_size": "64", "version": 1}, "group_size is '64'"),
        ({"quant_method": "ternary", "group_size": [64], "version": 1}, r"group_size is \[64\]"),
        ({"quant_method": "ternary", "group_size": 128, "version": 1}, "has rows of 64, not a multiple of the group size 128"),
    ],
    ids=str,
)  # fmt: skip
def test_the_ternary_forms_own_keys(tmp_path, quantization, message):
    folder = checkpoint(tmp_path, CONFIG | {"quantization_config": quantization})
    with pytest.raises(TmexportError, match=message):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"), ("{", "cannot be read as JSON"), ("null", "holds a NoneType; expected a JSON object"),
        ("[]", "holds a list"), ("3", "holds a int"), ('"mamba2"', "holds a str"), (b"\xff\xfe", "cannot be read as JSON"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON|model_type is None"), ("{}", "model_type is None; expected 'mamba'"),
        ("[" * 100_000, "cannot be read as JSON"), ('{"a":' * 100_000, "cannot be read as JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "cannot be read as JSON"), (" " * (2**20 + 1), "has 1048577 bytes; expected at most 1048576"),
    ],
    ids=range(13),
)  # fmt: skip
def test_a_config_that_is_none(tmp_path, text, message):
    config_refused(tmp_path, text, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": 3}}, "ssm_cfg.layer is 3; expected 'Mamba1' or 'Mamba2'"), ({"ssm_cfg": [1]}, "ssm_cfg is a list; expected a JSON object"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim is True"), ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0, 1]}}, "dt is clamped"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx is \[1\]; only \[\] can be represented"), ({"d_intermediate": 8}, "d_intermediate is 8"),
        ({"vocab_size": "16"}, "vocab_size '16' and pad_vocab_size_multiple 8 must be positive whole numbers"),
        ({"pad_vocab_size_multiple": 0}, "must be positive whole numbers"), ({"pad_vocab_size_multiple": 2**40}, "vocab_size is 1099511627776"),
        ({"vocab_size": 0}, "must be positive"), ({"tie_embeddings": "no"}, "tied embeddings are 'no'"), ({"n_layer": 10**9}, "n_layer is 1000000000"),
    ],
    ids=str,
)  # fmt: skip
def test_the_state_spaces_dialect(tmp_path, changes, message):
    valid = {"d_model": 64, "n_layer": 1, "vocab_size": 16, "ssm_cfg": {"layer": "Mamba2"}}
    config_refused(tmp_path, json.dumps(valid | changes), message)


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def tokenizer_refused(path, content: object, message: str) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=message) as caught:
        export_tokenizer(path, TOKENIZER_MODEL)
    assert str(caught.value).isprintable()


def test_the_unbroken_tokenizer_is_read(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json()))
    metadata = export_tokenizer(path, TOKENIZER_MODEL).metadata
    assert metadata["tokenizer.ggml.tokens"][256:258] == ["he", "<|endoftext|>"]
    assert parse_tokenizer(path.read_text(), "t").encode("hehe").ids == [256, 256]


def _model(**changes: object) -> dict[str, object]:
    raw = tokenizer_json()
    return raw | {"model": raw["model"] | changes}


def _added(**changes: object) -> dict[str, object]:
    raw = tokenizer_json()
    return raw | {"added_tokens": [raw["added_tokens"][0] | changes]}


def _split(pattern: object, **changes: object) -> dict[str, object]:
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False} | changes
    byte_level = tokenizer_json()["pre_tokenizer"] | {"use_regex": False}
    return tokenizer_json() | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a tokenizer.json the tokenizers library can load"), (b"\xff", "cannot be read|not a tokenizer.json"), (b"null", "not a tokenizer.json"),
        (b"[]", "not a tokenizer.json"), (b"{}", "not a tokenizer.json"), (b"[" * 100_000, "not a tokenizer.json"), ({"model": None}, "not a tokenizer.json"),
        (_model(type="Unigram"), "component of type 'Unigram'; expected a byte-level BPE"), (_model(type="WordLevel"), "component of type 'WordLevel'"),
        (_model(vocab=[]), "not a tokenizer.json"), (_model(vocab={"a": -1}), "not a tokenizer.json"), (_model(vocab={"a": 2**32}), "not a tokenizer.json"),
        (_model(vocab={"a": "1"}), "not a tokenizer.json"), (_model(vocab={"a": 1, "b": 1}), "token ids are not distinct|not a tokenizer.json"),
        (_model(merges=[["h"]]), "not a tokenizer.json"), (_model(merges=[["q", "missing"]]), "not a tokenizer.json"),
        (_model(merges=[1]), "not a tokenizer.json"), (_model(merges={}), "not a tokenizer.json"),
        (_model(vocab=tokenizer_json()["model"]["vocab"] | {"z": 512}), "has the token id 512, but the model has 512 embeddings; it is another model's"),
        (_model(vocab=tokenizer_json()["model"]["vocab"] | {"z": 2**32 - 1}), "has the token id 4294967295"),
        (_added(id=3), "token ids are not distinct"), (_added(id=-1), "not a tokenizer.json"), (_added(content=3), "not a tokenizer.json"),
        (_added(id=2**40), "not a tokenizer.json"),
        (tokenizer_json() | {"added_tokens": 3}, "not a tokenizer.json"), (tokenizer_json() | {"pre_tokenizer": None}, "expected one ByteLevel"),
        (tokenizer_json() | {"pre_tokenizer": {"type": "Whitespace"}}, "component of type 'Whitespace'"),
        (tokenizer_json() | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "component of type 'Precompiled'"),
        (tokenizer_json() | {"pre_tokenizer": tokenizer_json()["pre_tokenizer"] | {"add_prefix_space": True}}, "expected one ByteLevel pre-tokenizer that adds no space"),
        (_split({"Regex": "(a+)+$"}), r"splits text by the expression '\(a\+\)\+\$', which llama.cpp has no name for"),
        (_split({"Regex": "("}), "splits text by the expression"),
        (_split({"String": " "}), "splits text in a way llama.cpp has no name for"),
        (tokenizer_json() | {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|a)*b"}, "content": ""}}, "expression|component"),
    ],
    ids=range(33),
)  # fmt: skip
def test_a_tokenizer_that_lies(tmp_path, content, message):
    tokenizer_refused(tmp_path / "tokenizer.json", content, message)


def test_padding_and_truncation_from_the_file_are_not_obeyed():
    """Padding to 4 thousand million tokens would take 100 GB at the first word typed."""
    padding = {"strategy": {"Fixed": 2**32 - 1}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    tokenizer = parse_tokenizer(json.dumps(tokenizer_json() | {"padding": padding, "truncation": truncation}), "t")
    assert tokenizer.encode("hehehe").ids == [256, 256, 256]


def test_a_panic_of_the_library_is_our_error(monkeypatch):
    import tokenizers

    class PanicException(BaseException):
        pass

    class Panics:
        @staticmethod
        def from_str(text):
            raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
    with pytest.raises(
        TokenizerError, match="t: is not a tokenizer.json the tokenizers library can load: index out of bounds"
    ):
        parse_tokenizer("{}", "t")


def test_a_real_panic_of_the_library_is_our_error():
    """Found by the fuzzer: in a model without its optional fields, a merge into a token that is not there."""
    raw = tokenizer_json()
    raw["model"] = {"type": "BPE", "vocab": {"h": 0, "e": 1}, "merges": [["h", "e"]]}
    with pytest.raises(TokenizerError, match="t: is not a tokenizer.json the tokenizers library can load: "):
        parse_tokenizer(json.dumps(raw), "t")


def test_what_is_not_a_tokenizer_file(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(TokenizerError, match="cannot be read"):
            export_tokenizer(path, TOKENIZER_MODEL)
    (tmp_path / "big").open("wb").truncate(2**26 + 1)  # sparse
    began = time.process_time()
    with pytest.raises(TokenizerError, match="has 67108865 bytes; expected at most 67108864"):
        export_tokenizer(tmp_path / "big", TOKENIZER_MODEL)
    assert time.process_time() - began < 1
    assert dense_config()["hidden_size"] == 64
