"""From a source of tensors to the arguments of `engine.run`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from runtime_ref.kernels.pack import Packed, PackedTernary, pack, stack
from runtime_ref.kernels.profiles import PROFILES, Exact, Fast
from runtime_ref.kernels.scratch import Dims, dims_of
from runtime_ref.weights import Matrix, Source, TernaryMatrix, small_tensors
from tmexport.errors import GGUFError


class Portable(NamedTuple):
    """Plain Numba loops; any CPU."""

    lanes: int


class Small(NamedTuple):
    """The fp32 vectors of all layers; fields and shapes as in `runtime_ref.weights.Weights`."""

    norm: np.ndarray
    norm_f: np.ndarray
    gate_norm: np.ndarray
    conv_weight: np.ndarray
    conv_bias: np.ndarray
    dt_bias: np.ndarray
    a: np.ndarray
    d: np.ndarray


class Built(NamedTuple):
    """The leading arguments of `engine.run`, in its order."""

    isa: Portable
    profile: Exact | Fast
    dims: Dims
    small: Small
    embedding: Packed
    in_proj: Packed
    out_proj: Packed
    head: Packed


def build(source: Source, profile: str) -> Built:
    """Pack every tensor of the model.

    Raises:
        GGUFError: types that the kernels do not compute.
    """
    c = source.config
    small = Small(**small_tensors(source))
    stacks, blocks = [], []
    for name, k in (("ssm_in", c.d_model), ("ssm_out", c.d_inner)):
        layers, block = [], 32
        for i in range(c.n_layer):
            matrix = source.matrix(f"blk.{i}.{name}.weight")
            block = activation_block(matrix, profile)
            if k % block:
                raise GGUFError(f"blk.{i}.{name}.weight: rows of {k} do not divide into activation blocks of {block}")
            layers.append(pack(matrix))
        try:
            stacks.append(stack(layers, name))
        except ValueError as error:
            raise GGUFError(str(error)) from None
        blocks.append(block)
    embedding = _one(source, "token_embd.weight")
    head = embedding if source.tied else _one(source, "output.weight")
    return Built(Portable(16), PROFILES[profile], dims_of(c, *blocks), small, embedding, stacks[0], stacks[1], head)


def activation_block(matrix: Matrix, profile: str) -> int:
    """How many activations share a scale when multiplied with this matrix."""
    if isinstance(matrix, TernaryMatrix):
        return matrix.group if profile == "exact" else matrix.fast_block
    return 32


def _one(source: Source, name: str) -> Packed:
    packed = pack(source.matrix(name))
    if isinstance(packed, PackedTernary):
        raise GGUFError(f"{name}: is ternary; expected F16, F32, BF16, Q8_0 or Q4_0 for an embedding or head")
    return stack([packed], name)
