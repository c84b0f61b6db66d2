"""Small random models in memory, under GGUF names, with dynamics that stay finite."""

from __future__ import annotations

import hashlib

import numpy as np

from runtime_ref.model import Model
from runtime_ref.reference import ReferenceModel
from runtime_ref.reference.blocks import BlockMatrix
from runtime_ref.reference.dense import DenseMatrix
from runtime_ref.reference.ternary import TernaryMatrix
from runtime_ref.weights import Matrix, Source, load_weights, memory_source
from tmexport.model import Model as ModelSpec
from tmexport.model import mamba2_model
from tmexport.model.spec import Branch

RANGES = {  # of the small tensors, by role
    "conv_weight": (-0.5, 0.5),
    "conv_bias": (-0.1, 0.1),
    "dt_bias": (-5.0, 0.0),
    "a": (-16.0, -1.0),
    "d": (0.5, 1.5),
    "gate_norm": (0.5, 1.5),
}
CONFIG = mamba2_model(d_model=256, n_layer=2, vocab_size=300, d_state=64, n_groups=2)
TOKENS = [5, 299, 0, 17, 17, 255, 63, 128, 4, 5]


def matrix(rng: np.random.Generator, n: int, k: int, kind: str) -> Matrix:
    """kind: ternary256, ternary64 (as in a Q2_0 file), q8_0, q4_0, f16 or f32."""
    if kind.startswith("ternary"):
        group = int(kind.removeprefix("ternary"))
        codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
        scales = (k**-0.5 * rng.uniform(0.5, 2.0, (n, k // group))).astype(np.float16)
        scales[n // 2] = 0.0
        codes[n // 2] = 0
        return TernaryMatrix(codes, scales, 256 if group == 256 else 32)
    if kind in ("q8_0", "q4_0"):
        bits = int(kind[1])
        codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k)).astype(np.int8)
        return BlockMatrix(codes, (rng.uniform(0.5, 2.0, (n, k // 32)) / 2 ** (bits + 3)).astype(np.float16), bits)
    values = rng.standard_normal((n, k)) * k**-0.5
    return DenseMatrix(values.astype(np.float16 if kind == "f16" else np.float32))


def tensors(
    config: ModelSpec, body: str = "ternary256", embedding: str = "q8_0", head: str | None = None, seed: int = 0
) -> dict[str, np.ndarray | Matrix]:
    """Every tensor of a model; head None ties it to the embedding."""
    rng, c = np.random.default_rng(seed), config
    named: dict[str, np.ndarray | Matrix] = {
        "token_embd.weight": matrix(rng, c.vocab_size, c.d_model, embedding),
        "output_norm.weight": rng.uniform(0.5, 1.5, c.d_model).astype(np.float32),
    }
    if head:
        named["output.weight"] = matrix(rng, c.vocab_size, c.d_model, head)
    for i, block in enumerate(c.blocks):
        named[f"blk.{i}.attn_norm.weight"] = rng.uniform(0.5, 1.5, c.d_model).astype(np.float32)
        for branch in block.branches:
            named |= {f"blk.{i}.{name}": tensor for name, tensor in _branch(rng, branch, body).items()}
    return named


def _branch(rng: np.random.Generator, branch: Branch, body: str) -> dict[str, np.ndarray | Matrix]:
    """A branch's tensors; `body` is the type of what may be low-bit."""
    named: dict[str, np.ndarray | Matrix] = {}
    for spec in branch.tensors():
        shape = spec.gguf_shape or spec.shape
        if spec.low_bit or spec.matrix:
            named[spec.gguf] = matrix(rng, *shape, body if spec.low_bit else "f16")
        else:
            low, high = RANGES[spec.role]
            named[spec.gguf] = rng.uniform(low, high, shape).astype(np.float32)
    return named


def source(body: str = "ternary256", embedding: str = "q8_0", head: str | None = None, seed: int = 0) -> Source:
    return memory_source(CONFIG, tensors(CONFIG, body, embedding, head, seed))


def reference_logits(src: Source, profile: str, tokens: list[int]) -> np.ndarray:
    """Logits fp32 [tokens, vocab] of the specification."""
    model = ReferenceModel(load_weights(src), profile)
    state = model.new_state()
    return np.stack([model.step(state, token) for token in tokens])


def all_logits(model: Model, tokens: list[int]) -> np.ndarray:
    return np.concatenate(list(model.score(model.new_state(), tokens)))


def sha(logits: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(logits, np.float32).tobytes()).hexdigest()
