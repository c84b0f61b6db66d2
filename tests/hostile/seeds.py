"""Where the fuzzers start: small valid files of every kind, and the words of their formats."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

from tests.hostile.builders import (
    ARRAY,
    BOOL,
    CONFIG,
    FLOAT,
    I32,
    Q2_0,
    STRING,
    TQ1_0,
    TQ2_0,
    U32,
    U64,
    dense_arrays,
    model,
    safetensors_file,
    safetensors_header,
    ternary_arrays,
    tokenizer_json,
    value,
)  # fmt: skip

_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gguf_seeds() -> list[bytes]:
    arrays = (
        model()
        .with_key("tokenizer.ggml.tokens", value(ARRAY, (STRING, ["a", "b"])))
        .with_key("general.alignment", value(U32, 32))
    )
    arrays = arrays.with_key("x", value(ARRAY, (I32, [1, 2]))).with_key("y", value(ARRAY, (BOOL, [0, 1])))
    return [model().build(), arrays.build(), model(Q2_0, d=128).build(), model(TQ1_0).build(), model(TQ2_0).build()]


def gguf_words() -> list[bytes]:
    numbers = [struct.pack("<I", n) for n in range(14)] + [struct.pack("<Q", n) for n in (0, 32, 64, 2**32, 2**63)]
    typed = [
        value(U32, 64),
        value(FLOAT, 1e-5),
        value(STRING, "mamba2"),
        value(BOOL, 1),
        value(U64, 2**40),
        value(ARRAY, (U32, [1])),
    ]
    names = [key.encode() for key in model().keys if isinstance(key, str)] + [
        t.name.encode() for t in model().tensors if isinstance(t.name, str)
    ]
    return numbers + typed + names + [b"GGUF", b"general.alignment", b"output.weight"]


def torch_file(arrays: object) -> tuple[bytes, bytes]:
    """The archive that torch.save makes of a state dict, and the pickle inside it."""
    import zipfile

    import torch

    assert isinstance(arrays, dict)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.bin"
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
        with zipfile.ZipFile(path) as archive:
            pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
        return path.read_bytes(), pickled


def checkpoint_seeds() -> list[bytes]:
    """The first byte chooses the file, as `accepts_checkpoint` reads it."""
    header, data = safetensors_header(ternary_arrays())
    archive, pickled = torch_file(dense_arrays())
    state_spaces = {
        "d_model": 64,
        "n_layer": 1,
        "vocab_size": 16,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "expand": 1},
        "rms_norm": True,
    }
    index = {"metadata": {}, "weight_map": dict.fromkeys(header, "a.safetensors")}
    return [
        b"\0" + safetensors_file(header, data),
        b"\1" + json.dumps(header).encode(),
        b"\2" + json.dumps(CONFIG).encode(),
        b"\6" + json.dumps(state_spaces).encode(),
        b"\3" + json.dumps(index).encode(),
        b"\4" + archive,
        b"\5" + pickled,
    ]


def checkpoint_words() -> list[bytes]:
    header, _ = safetensors_header(ternary_arrays())
    words = [*header, *CONFIG, "F32", "F16", "BF16", "U8", "I64", "data_offsets", "dtype", "shape", "__metadata__", "../", "/", "NaN",
             "Infinity", "1e999", "null", "true", "[", "]", "{", "}", "ctorch\n_utils\n", "cos\nsystem\n", "cbuiltins\neval\n", "torch._utils",
             "_rebuild_tensor_v2", "FloatStorage", "collections\nOrderedDict"]  # fmt: skip
    opcodes = [
        bytes([c])
        for c in b"(.0125FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94\x95"
    ]
    return [word.encode() for word in words] + opcodes + [b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"]


def tokenizer_seeds() -> list[bytes]:
    plain = tokenizer_json()
    split = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}  # fmt: skip
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [257], "tokens": ["<|endoftext|>"]}}}  # fmt: skip
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    variants = [plain, plain | {"pre_tokenizer": split}, plain | {"post_processor": template, "normalizer": {"type": "NFC"}},
                plain | {"padding": padding, "truncation": truncation}]  # fmt: skip
    return [json.dumps(v, ensure_ascii=i % 2 == 0, separators=(",", ":")).encode() for i, v in enumerate(variants)]


def tokenizer_words() -> list[bytes]:
    words = ["type", "BPE", "Unigram", "WordPiece", "WordLevel", "ByteLevel", "Split", "Regex", "String", "Sequence", "Precompiled", "precompiled_charsmap",
             "Metaspace", "Replace", "content", "pattern", "(a+)+$", "normalizers", "Lowercase", "Strip", "Prepend", "TemplateProcessing", "Fixed",
             "BatchLongest", "Longest", "OnlyFirst", "stride", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback",
             "merges", "vocab", "added_tokens", "special", "single_word", "id", "null", "true", "false", "1e999", "4294967295", "18446744073709551615", "-1",
             "\\u0000", "\\ud800", "[", "]", "{", "}", ":", ",", '"']  # fmt: skip
    return [word.encode() for word in words]
