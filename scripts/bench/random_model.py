"""A GGUF with random weights at a published shape, Mamba-2 or a hybrid, for measuring speed without a download.

Example: python scripts/bench/random_model.py --size 1.3b --type tq2_0 /tmp/1.3b.gguf

The dynamics are those of mamba_ssm's initialisation (A in [1, 16], dt in [0.001, 0.1]), so logits stay finite. The last
line on stdout is one JSON object: path, size, type, bytes, parameters.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from tmexport.cli.app import run_command
from tmexport.gguf.names import model_metadata, tensor_shapes
from tmexport.gguf.writer import PlannedTensor, write_gguf
from tmexport.model import Block, Branch, Model, mamba2_model
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.branches.mlp import SwiGLU
from tmexport.types import FILE_TYPES, GGMLType, encode_codes, encode_values
from tmexport.types.ternary import TernaryTensor

# d_model, layers; vocabulary 50288, d_state 128, headdim 64 in all (state-spaces/mamba2-*)
SIZES = {
    "demo": (256, 6),
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}
# Granite-4.0-H (ibm-granite/granite-4.0-h-*): d_model, layers, those of attention, d_ff, width of a head of attention and of Mamba-2
HYBRIDS = {
    "granite-350m": (768, 32, (10, 13, 17, 27), 2048, 64, 32),
    "granite-1b": (1536, 40, (5, 15, 25, 35), 4096, 128, 64),
}
TERNARY = {"tq1_0": GGMLType.TQ1_0, "tq2_0": GGMLType.TQ2_0, "q2_0": GGMLType.Q2_0}
BODY = TERNARY | {"q4_0": GGMLType.Q4_0, "q8_0": GGMLType.Q8_0, "f16": GGMLType.F16}
EMBEDDING = {"f16": GGMLType.F16, "q8_0": GGMLType.Q8_0, "q4_0": GGMLType.Q4_0}


def shape_of(size: str) -> Model:
    """What a size stands for; the hybrids have Granite's multipliers, 12 heads of queries, 4 of keys, and no positions."""
    if size in SIZES:
        d_model, n_layer = SIZES[size]
        return mamba2_model(d_model=d_model, n_layer=n_layer, vocab_size=50288)
    d_model, n_layer, attended, d_ff, head_dim, headdim = HYBRIDS[size]
    mamba, mlp = Mamba2(d_model, 2 * d_model, headdim=headdim), SwiGLU(d_model, d_ff)
    attention = Attention(d_model, 12, 4, head_dim, 1.0 / head_dim, rope_theta=None)
    mixers: list[Branch] = [attention if number in attended else mamba for number in range(n_layer)]
    blocks = tuple(Block((branch,), 0.246) for mixer in mixers for branch in (mixer, mlp))
    return Model(
        d_model,
        100352,
        blocks,
        family="granitehybrid",
        embedding_multiplier=12.0,
        logits_divisor=3.0,
        context_length=32768,
    )


def random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """fp32 values of a tensor that is not ternary."""
    values: np.ndarray
    if name.endswith("ssm_a"):
        values = -rng.uniform(1.0, 16.0, shape)
    elif name.endswith("ssm_dt.bias"):
        values = np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), shape))))
    elif "norm" in name or name.endswith("ssm_d"):
        values = np.ones(shape)
    else:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.5 if "conv1d" in name else 0.1)
    return values.astype(np.float32)


def random_ternary(shape: tuple[int, ...], group: int, rng: np.random.Generator) -> TernaryTensor:
    """Random codes; scales near those of a trained projection."""
    n, k = shape
    codes = (rng.integers(0, 255, (n, k), np.uint8) % 3).astype(np.int8) - np.int8(1)
    scales = (rng.uniform(0.5, 1.5, (n, k // group)) * k**-0.5).astype(np.float16)
    return TernaryTensor(codes, scales, group)


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice([*SIZES, *HYBRIDS]), default="1.3b", show_default=True)
@click.option("--type", "kind", type=click.Choice(list(BODY)), default="tq2_0", show_default=True)
@click.option("--embedding-type", type=click.Choice(list(EMBEDDING)), default="q8_0", show_default=True)
@click.option(
    "--group-size", type=click.Choice(["64", "128", "256"]), help="Default: 64 for q2_0, 256 for ternary types."
)
@click.option("--seed", type=int, default=0, show_default=True)
def main(output: Path, size: str, kind: str, embedding_type: str, group_size: str | None, seed: int) -> None:
    """Write OUTPUT, random weights at a published shape."""
    group = int(group_size or (64 if kind == "q2_0" else 256)) if kind in TERNARY else None
    if group is None and group_size is not None:
        raise click.UsageError(f"{kind} has blocks of its own; leave --group-size out")
    if kind in TERNARY and kind != "q2_0" and group != 256:
        raise click.UsageError(f"{kind} stores one scale for 256 weights; expected --group-size 256")
    config = shape_of(size)
    projections = {config.tensors[name].gguf for name in config.projections}
    rng = np.random.default_rng(seed)

    def planned(name: str, shape: tuple[int, ...]) -> PlannedTensor:
        if name in projections and group is not None:
            return PlannedTensor(
                name, shape, BODY[kind], lambda: encode_codes(random_ternary(shape, group, rng), BODY[kind], name)
            )
        stored = EMBEDDING[embedding_type] if name == "token_embd.weight" else GGMLType.F32
        stored = BODY[kind] if name in projections else stored
        return PlannedTensor(
            name, shape, stored,
            lambda: encode_values(random_values(name, shape, rng).reshape(-1, shape[-1]), stored, name),
        )  # fmt: skip

    tensors = [planned(name, shape) for name, shape in tensor_shapes(config).items()]
    metadata = model_metadata(
        config, FILE_TYPES[BODY[kind]], f"random {size}" if size in HYBRIDS else f"random mamba2-{size}", group
    )
    # A stand-in vocabulary, so that llama.cpp loads the file too; token ids are all that is ever used.
    metadata |= {"tokenizer.ggml.model": "no_vocab"}
    size_bytes = write_gguf(output, metadata, tensors)
    parameters = sum(int(np.prod(t.shape)) for t in tensors)
    click.echo(
        json.dumps({"path": str(output), "size": size, "type": kind, "bytes": size_bytes, "parameters": parameters})
    )


if __name__ == "__main__":
    run_command(main, "scripts/bench/random_model.py")
