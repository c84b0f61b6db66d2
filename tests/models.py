"""Small models with random weights whose dynamics are those of a trained one: finite, and not degenerate."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.checkpoint import EMBEDDING, expected_shapes, write_checkpoint
from tmexport.model import Model, mamba2_model
from tmexport.types import Coded
from tmexport.types.binary import BinaryTensor
from tmexport.types.blocks import Int4Tensor, Int8Tensor
from tmexport.types.ternary import TernaryTensor

SMALL = mamba2_model(d_model=256, n_layer=2, vocab_size=512, d_state=64, tie_embeddings=False)


def mixer(config: Model) -> Any:
    """The one branch that all blocks of a model have."""
    (branch,) = {branch for block in config.blocks for branch in block.branches}
    return branch


def random_tensors(config: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """fp32 weights by Hugging Face name, drawn as mamba_ssm initialises them (A in [1, 16], dt in [1e-3, 1e-1])."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        if name.endswith("A_log") and len(shape) == 2:  # of Mamba-1
            values = np.log(np.arange(1, shape[1] + 1) * rng.uniform(0.8, 1.25, shape))
        elif name.endswith("A_log"):
            values = np.log(rng.uniform(1, 16, shape))
        elif name.endswith(("dt_bias", "dt_proj.bias")):
            values = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))))
        elif "norm" in name or name.endswith(".D"):
            values = 1 + 0.1 * rng.standard_normal(shape)
        elif "conv1d" in name:
            values = 0.3 * rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) * (0.5 if name == EMBEDDING else shape[1] ** -0.5)
        tensors[name] = values.astype(np.float32)
    return tensors


def random_ternary(n: int, k: int, group_size: int, seed: int = 0) -> TernaryTensor:
    """Codes and positive normal fp16 scales, drawn independently of any quantiser."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
    scales = (k**-0.5 * rng.uniform(0.5, 2.0, (n, k // group_size))).astype(np.float16)
    return TernaryTensor(codes, scales, group_size)


def random_binary(n: int, k: int, seed: int = 0) -> BinaryTensor:
    """Signs, and positive normal fp16 scales a group of 128."""
    ternary = random_ternary(n, k, 128, seed)
    signs = np.where(np.random.default_rng(seed + 1).random((n, k)) < 0.5, -1, 1).astype(np.int8)
    return BinaryTensor(signs, ternary.scales, 128)


def random_blocks(n: int, k: int, kind: str, seed: int = 0) -> Int8Tensor | Int4Tensor:
    """Codes over the whole range of int8 or int4, and fp16 scales a block of 32: of both signs for int4, one of them 0."""
    rng = np.random.default_rng(seed)
    tensor = {"int8": Int8Tensor, "int4": Int4Tensor}[kind]
    codes = rng.integers(tensor.allowed[0], tensor.allowed[-1] + 1, (n, k)).astype(np.int8)
    scales = k**-0.5 * rng.uniform(0.5, 2.0, (n, k // 32)) / tensor.allowed[-1]
    if kind == "int4":
        scales *= rng.choice([-1, 1], scales.shape)
    scales[-1, -1], codes[-1, -32:] = 0, 0
    return tensor(codes, scales.astype(np.float16), 32)


RANDOM: dict[str, Callable[[int, int, int], Coded]] = {
    "ternary": lambda n, k, seed: random_ternary(n, k, 256, seed),
    "binary": random_binary,
    "int8": lambda n, k, seed: random_blocks(n, k, "int8", seed),
    "int4": lambda n, k, seed: random_blocks(n, k, "int4", seed),
}


def coded_tensors(
    config: Model, projections: str | dict[str, str], embedding: str = "dense", seed: int = 0
) -> dict[str, np.ndarray | Coded]:
    """`random_tensors` with codes: of the projections (a kind, or one by role) and, unless it is dense, of the embedding and
    an untied head.
    """
    tensors: dict[str, np.ndarray | Coded] = dict(random_tensors(config, seed))
    for index, (name, tensor) in enumerate(config.tensors.items()):
        inside = projections if isinstance(projections, str) else projections.get(tensor.role, "dense")
        kind = (inside if tensor.block is not None else embedding) if tensor.low_bit else "dense"
        if kind != "dense":
            tensors[name] = RANDOM[kind](*tensor.shape, seed + index + 1)
    return tensors


def ternary_tensors(config: Model, group_size: int = 256, seed: int = 0) -> dict[str, np.ndarray | TernaryTensor]:
    """`random_tensors` with exactly ternary projections."""
    tensors: dict[str, np.ndarray | TernaryTensor] = dict(random_tensors(config, seed))
    for index, name in enumerate(config.projections):
        tensors[name] = random_ternary(*tensors[name].shape, group_size, seed + index + 1)
    return tensors


def write_state_spaces(folder: Path, config: Model, tensors: dict[str, np.ndarray], vocab_size: int) -> None:
    """The same weights as `state-spaces/mamba2-*` has them: pytorch_model.bin, mamba_ssm's names and config.json."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name.replace("backbone.embeddings", "backbone.embedding"): torch.from_numpy(v) for name, v in tensors.items()
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    raw = {
        "d_model": config.d_model,
        "d_intermediate": 0,
        "n_layer": config.n_layer,
        "vocab_size": vocab_size,
        "ssm_cfg": {"layer": "Mamba2", "d_state": mixer(config).d_state, "ngroups": mixer(config).n_groups},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 16,
        "tie_embeddings": config.tie_embeddings,
    }
    (folder / "config.json").write_text(json.dumps(raw))


def train_tokenizer(path: Path, size: int = 500) -> Path:
    """A real byte-level BPE, GPT-2's way, trained on the first speeches of the shipped corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with lzma.open(
        Path(__file__).parent.parent / "scripts" / "demo" / "data" / "sotu.jsonl.xz", "rt", encoding="utf-8"
    ) as speeches:
        tokenizer.train_from_iterator([json.loads(next(speeches))["text"] for _ in range(3)], trainer)
    tokenizer.save(str(path))
    return path


def write_small(folder: Path, config: Model = SMALL, group_size: int | None = None, seed: int = 0) -> Path:
    """A checkpoint folder with a tokenizer; ternary if a group size is given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config, seed) if group_size is None else ternary_tensors(config, group_size, seed)
    write_checkpoint(folder, config, tensors, train_tokenizer(folder / "tokenizer.json"))
    return folder
