"""The weights of a model as plain arrays, from a GGUF file or from memory; the form the specification reads.

`runtime_ref.kernels.pack` turns the same matrices into the kernels' layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime_ref.arithmetic import Preset
from tmexport.config import Mamba2Config

if TYPE_CHECKING:
    from runtime_ref.kernels.pack import Packed


@dataclass(frozen=True)
class TernaryMatrix:
    """codes int8 [n, k] in {-1, 0, 1}; scales fp16 [n, k / group]; fast_block: activation block of profile `fast`.

    fast_block is what llama.cpp uses with the container the matrix came from: 256 for TQ1_0 and TQ2_0, 32 for Q2_0.
    """

    codes: np.ndarray
    scales: np.ndarray
    fast_block: int = 256

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]


@dataclass(frozen=True)
class BlockMatrix:
    """Q8_0 (codes -128..127) or Q4_0 (bits = 4, codes -8..7): codes int8 [n, k]; scales fp16 [n, k / 32]."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int = 8


@dataclass(frozen=True)
class DenseMatrix:
    """values fp32 or fp16 [n, k]."""

    values: np.ndarray


Matrix = TernaryMatrix | BlockMatrix | DenseMatrix


@dataclass(frozen=True)
class Weights:
    """A whole model; L layers, shapes as in `runtime_ref.reference`.

    embedding [V, d] and head [V, d] (the same object when tied); in_proj, out_proj: one matrix a layer;
    norm [L, d], norm_f [d], gate_norm [L, d_inner], conv_weight [L, K, C] (tap-major), conv_bias [L, C],
    dt_bias, a (= -exp(A_log)), d [L, H]: fp32.
    """

    config: Mamba2Config
    embedding: Matrix
    head: Matrix
    in_proj: tuple[Matrix, ...]
    out_proj: tuple[Matrix, ...]
    norm: np.ndarray
    norm_f: np.ndarray
    gate_norm: np.ndarray
    conv_weight: np.ndarray
    conv_bias: np.ndarray
    dt_bias: np.ndarray
    a: np.ndarray
    d: np.ndarray


@dataclass(frozen=True)
class Source:
    """Where tensors come from, read one at a time: `matrix(name)` and `vector(name)` take GGUF names.

    Attributes:
        config: the dimensions.
        matrix: a weight matrix by name.
        packed: the same in the kernels' layout (`kernels.pack`).
        activation_block: how many activations share a scale when multiplied with a matrix, by name, in a preset.
        vector: any small tensor by name, fp32, in numpy's (rows first) shape.
        tied: there is no separate head.
    """

    config: Mamba2Config
    matrix: Callable[[str], Matrix]
    packed: Callable[[str], Packed]
    activation_block: Callable[[str, Preset], int]
    vector: Callable[[str], np.ndarray]
    tied: bool


def small_tensors(source: Source) -> dict[str, np.ndarray]:
    """Every fp32 vector of the model, stacked over the layers, with the field names and shapes of `Weights`."""
    c = source.config

    def stack(suffix: str, shape: tuple[int, ...]) -> np.ndarray:
        parts = [source.vector(f"blk.{i}.{suffix}").reshape(shape) for i in range(c.n_layer)]
        return np.ascontiguousarray(np.stack(parts), np.float32)

    conv = stack("ssm_conv1d.weight", (c.conv_dim, c.d_conv))
    return {
        "norm": stack("attn_norm.weight", (c.d_model,)),
        "norm_f": np.array(source.vector("output_norm.weight").reshape(c.d_model), np.float32),
        "gate_norm": stack("ssm_norm.weight", (c.d_inner,)),
        "conv_weight": np.ascontiguousarray(conv.transpose(0, 2, 1)),
        "conv_bias": stack("ssm_conv1d.bias", (c.conv_dim,)),
        "dt_bias": stack("ssm_dt.bias", (c.n_heads,)),
        "a": stack("ssm_a", (c.n_heads,)),
        "d": stack("ssm_d", (c.n_heads,)),
    }


def load_weights(source: Source) -> Weights:
    """The whole model in plain form (int8 codes: four times the packed size; for the specification and for tests)."""
    layers = range(source.config.n_layer)
    embedding = source.matrix("token_embd.weight")
    return Weights(
        config=source.config,
        embedding=embedding,
        head=embedding if source.tied else source.matrix("output.weight"),
        in_proj=tuple(source.matrix(f"blk.{i}.ssm_in.weight") for i in layers),
        out_proj=tuple(source.matrix(f"blk.{i}.ssm_out.weight") for i in layers),
        **small_tensors(source),
    )


def memory_source(config: Mamba2Config, tensors: dict[str, np.ndarray | Matrix]) -> Source:
    """A model held in memory, tensors under their GGUF names (for tests and experiments)."""
    from runtime_ref.kernels.pack import pack

    return Source(
        config,
        matrix=tensors.__getitem__,  # type: ignore[arg-type]
        packed=lambda name: pack(tensors[name]),  # type: ignore[arg-type]
        activation_block=lambda name, preset: activation_block(tensors[name], preset),  # type: ignore[arg-type]
        vector=tensors.__getitem__,  # type: ignore[arg-type]
        tied="output.weight" not in tensors,
    )


def activation_block(matrix: Matrix, preset: Preset) -> int:
    """How many activations share a scale when multiplied with this matrix."""
    if isinstance(matrix, TernaryMatrix):
        return preset.activations.block(matrix.group, matrix.fast_block)
    return 32
