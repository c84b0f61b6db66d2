"""Files built byte by byte, from the specifications alone: valid ones, and ones broken in exactly one place.

Nothing here uses tmexport's writers, so a mistake there cannot hide one in the readers.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q4_0, Q8_0, BF16, TQ1_0, TQ2_0, Q2_0 = 0, 1, 2, 8, 30, 34, 35, 42
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_0: (32, 18), Q8_0: (32, 34), BF16: (1, 2), TQ1_0: (256, 54), TQ2_0: (256, 66), Q2_0: (64, 18)}  # fmt: skip
U8, I8, U16, I16, U32, I32, FLOAT, BOOL, STRING, ARRAY, U64, I64, DOUBLE = range(13)
_FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", FLOAT: "f", BOOL: "B", U64: "Q", I64: "q", DOUBLE: "d"}  # fmt: skip


def gguf_string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """A metadata value with its type: a number, a string, or for ARRAY a pair (item type, items)."""
    if kind == STRING:
        return struct.pack("<I", kind) + gguf_string(content)
    if kind == ARRAY:
        item, items = content
        packed = [gguf_string(i) if item == STRING else struct.pack("<" + _FORMATS[item], i) for i in items]
        return struct.pack("<IIQ", kind, item, len(items)) + b"".join(packed)
    return struct.pack("<I" + _FORMATS[kind], kind, content)


@dataclass(frozen=True)
class Tensor:
    """dims in ggml's order (contiguous first); the offset is computed unless given."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None
    n_dims: int | None = None


@dataclass(frozen=True)
class Gguf:
    """A GGUF file in parts; `build` lays it out. Keys map a name to an encoded value."""

    keys: dict[str | bytes, bytes]
    tensors: list[Tensor]
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32
    extra_keys: list[tuple[str | bytes, bytes]] = field(default_factory=list)  # repeated keys

    def header(self) -> bytes:
        keys = [*self.keys.items(), *self.extra_keys]
        counts = [
            len(self.tensors) if self.n_tensors is None else self.n_tensors,
            len(keys) if self.n_keys is None else self.n_keys,
        ]
        parts = [self.magic, self.version, struct.pack("<QQ", *counts)]
        parts += [gguf_string(key) + encoded for key, encoded in keys]
        offset = 0
        for tensor in self.tensors:
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            parts.append(gguf_string(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", n_dims, *tensor.dims))
            parts.append(struct.pack("<IQ", tensor.kind, offset if tensor.offset is None else tensor.offset))
            offset += -(-len(tensor.data) // self.alignment) * self.alignment
        return b"".join(parts)

    def build(self) -> bytes:
        header = self.header()
        padded = [t.data + b"\0" * (-len(t.data) % self.alignment) for t in self.tensors]
        return header + b"\0" * (-len(header) % self.alignment) + b"".join(padded)

    def with_key(self, name: str | bytes, encoded: bytes | None) -> Gguf:
        """Replaced, added, or (None) left out."""
        keys = {k: v for k, v in self.keys.items() if k != name}
        return replace(self, keys=keys if encoded is None else keys | {name: encoded})

    def with_tensor(self, name: str, /, **changes: Any) -> Gguf:
        assert any(t.name == name for t in self.tensors), name
        return replace(self, tensors=[replace(t, **changes) if t.name == name else t for t in self.tensors])

    def tensor(self, name: str) -> Tensor:
        return next(t for t in self.tensors if t.name == name)


def ternary_blocks(kind: int, n: int, k: int, seed: int = 0, scale: float = 0.0625) -> bytes:
    """Random valid blocks, written element by element from the layouts in ggml-common.h."""
    rng = np.random.default_rng(seed)
    size, n_bytes = BLOCKS[kind]
    scale_bytes = np.float16(scale).tobytes()
    out = bytearray()
    for _ in range(n * k // size):
        digits = [int(d) for d in rng.integers(0, 3, size)]
        body = bytearray(n_bytes - 2)
        if kind == Q2_0:
            for i, d in enumerate(digits):
                body[i // 4] |= d << (2 * (i % 4))
        elif kind == TQ2_0:
            for i, d in enumerate(digits):
                body[i // 128 * 32 + i % 32] |= d << (2 * (i % 128 // 32))
        else:
            for start, count, first, steps in ((0, 32, 0, 5), (160, 16, 32, 5), (240, 4, 48, 4)):
                for m in range(count):
                    number = 0
                    for step in range(5):
                        number = number * 3 + (digits[start + step * count + m] if step < steps else 0)
                    body[first + m] = (number * 256 + 242) // 243
        out += scale_bytes + body if kind == Q2_0 else body + scale_bytes
    return bytes(out)


def floats(shape: tuple[int, ...], kind: int = F32, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).uniform(0.25, 1.0, shape).astype(np.float32)
    return values.astype(np.float16).tobytes() if kind == F16 else values.tobytes()


def model(kind: int = Q2_0, d: int | None = None, vocab: int = 16, state: int = 8) -> Gguf:
    """A complete one-layer Mamba-2 with expand 1 and heads of 64; a few kilobytes."""
    d = d or (64 if kind == Q2_0 else 256)
    heads = d // 64
    conv_dim, rows = d + 2 * state, 2 * d + 2 * state + heads
    whole = {"context_length": 2**20, "embedding_length": d, "feed_forward_length": 0, "attention.head_count": 0, "block_count": 1,
             "vocab_size": vocab, "ssm.conv_kernel": 4, "ssm.inner_size": d, "ssm.state_size": state, "ssm.time_step_rank": heads,
             "ssm.group_count": 1}  # fmt: skip
    keys: dict[str | bytes, bytes] = {
        "general.architecture": value(STRING, "mamba2"),
        "general.file_type": value(U32, 41),
        "tokenizer.ggml.model": value(STRING, "none"),
        "mamba2.attention.layer_norm_rms_epsilon": value(FLOAT, 1e-5),
        "tmexport.group_size": value(U32, 64 if kind == Q2_0 else 256),
    }
    keys |= {f"mamba2.{name}": value(U32, number) for name, number in whole.items()}
    tensors = [
        Tensor("token_embd.weight", (d, vocab), F16, floats((vocab, d), F16)),
        Tensor("blk.0.attn_norm.weight", (d,), F32, floats((d,))),
        Tensor("blk.0.ssm_in.weight", (d, rows), kind, ternary_blocks(kind, rows, d)),
        Tensor("blk.0.ssm_conv1d.weight", (4, conv_dim), F32, floats((conv_dim, 4))),
        Tensor("blk.0.ssm_conv1d.bias", (conv_dim,), F32, floats((conv_dim,))),
        Tensor("blk.0.ssm_dt.bias", (heads,), F32, floats((heads,))),
        Tensor("blk.0.ssm_a", (1, heads), F32, np.full(heads, -1, np.float32).tobytes()),
        Tensor("blk.0.ssm_d", (1, heads), F32, floats((heads,))),
        Tensor("blk.0.ssm_norm.weight", (d, 1), F32, floats((d,))),
        Tensor("blk.0.ssm_out.weight", (d, d), kind, ternary_blocks(kind, d, d, seed=1)),
        Tensor("output_norm.weight", (d,), F32, floats((d,))),
    ]
    return Gguf(keys, tensors)


# --- checkpoints -----------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "model_type": "mamba2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 16, "state_size": 8, "conv_kernel": 4,
    "expand": 1, "head_dim": 64, "num_heads": 1, "n_groups": 1, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    "time_step_limit": [0.0, {"__float__": "Infinity"}], "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
    "quantization_config": {"quant_method": "ternary", "group_size": 64, "version": 1},
}  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "uint8": "U8"}


def ternary_arrays() -> dict[str, np.ndarray]:
    """The tensors of CONFIG's model in the ternary checkpoint's form."""
    rng = np.random.default_rng(0)
    layer = "backbone.layers.0."

    def small(*shape: int) -> np.ndarray:
        return rng.uniform(0.25, 1.0, shape).astype(np.float32)

    def codes(n: int, k: int) -> np.ndarray:
        two_bit = rng.integers(0, 3, (n, k // 4, 4))
        return (two_bit * np.array([1, 4, 16, 64])).sum(axis=2).astype(np.uint8)

    return {
        "backbone.embeddings.weight": small(16, 64),
        layer + "norm.weight": small(64),
        layer + "mixer.in_proj.weight.codes": codes(145, 64),
        layer + "mixer.in_proj.weight.scales": np.full((145, 1), 0.0625, np.float16),
        layer + "mixer.conv1d.weight": small(80, 1, 4),
        layer + "mixer.conv1d.bias": small(80),
        layer + "mixer.dt_bias": small(1),
        layer + "mixer.A_log": small(1),
        layer + "mixer.D": small(1),
        layer + "mixer.norm.weight": small(64),
        layer + "mixer.out_proj.weight.codes": codes(64, 64),
        layer + "mixer.out_proj.weight.scales": np.full((64, 1), 0.0625, np.float16),
        "backbone.norm_f.weight": small(64),
    }


def dense_arrays() -> dict[str, np.ndarray]:
    """The same model with dense fp32 projections."""
    arrays = {k: v for k, v in ternary_arrays().items() if not k.endswith((".codes", ".scales"))}
    rng = np.random.default_rng(1)
    arrays["backbone.layers.0.mixer.in_proj.weight"] = rng.standard_normal((145, 64)).astype(np.float32)
    arrays["backbone.layers.0.mixer.out_proj.weight"] = rng.standard_normal((64, 64)).astype(np.float32)
    return arrays


def safetensors_header(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """The header as a dict, to be broken, and the data."""
    header, at = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}  # fmt: skip
        at += array.nbytes
    return header, b"".join(a.tobytes() for a in arrays.values())


def safetensors_file(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def dense_config(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in CONFIG.items() if k != "quantization_config"} | changes


def checkpoint(folder: Path, config: dict[str, Any] | None = None, arrays: dict[str, np.ndarray] | None = None) -> Path:
    """A valid ternary checkpoint folder, unless told otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "model.safetensors").write_bytes(
        safetensors_file(*safetensors_header(ternary_arrays() if arrays is None else arrays))
    )
    return folder


# --- tokenizers ------------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """GPT-2's 256 stand-ins for bytes, in byte order."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(others)) for b in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """A byte-level BPE with one merge and one special token: 258 ids."""
    vocab = {symbol: i for i, symbol in enumerate(byte_alphabet())} | {"he": 256}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"id": 257, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": [["h", "e"]]},
    }  # fmt: skip
