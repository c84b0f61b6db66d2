"""From a source of tensors to the arguments of `engine.run`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from runtime_ref.arithmetic import Activations, Preset, RecurrentState
from runtime_ref.kernels.isa import Isa, select
from runtime_ref.kernels.pack import Packed, empty_stack, expect, put
from runtime_ref.kernels.scratch import Dims, dims_of
from runtime_ref.weights import Source, small_tensors
from tmexport.errors import GGUFError


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

    isa: Isa
    activations: Activations
    state: RecurrentState
    dims: Dims
    small: Small
    embedding: Packed
    in_proj: Packed
    out_proj: Packed
    head: Packed


def build(source: Source, preset: Preset) -> Built:
    """Pack every tensor of the model, layers on a few threads.

    Raises:
        GGUFError: damaged tensors, or types and dimensions that the kernels do not compute.
    """
    c = source.config
    kinds = {branch.kind for block in c.blocks for branch in block.branches}
    if kinds != {"mamba2"} or len(set(c.blocks)) > 1:
        raise GGUFError(
            f"the model has blocks of {', '.join(sorted(kinds))}; this runtime computes equal blocks of mamba2"
        )
    for what, size in (("d_model", c.d_model), ("headdim", c.headdim), ("d_state", c.d_state)):
        if size % 16:
            raise GGUFError(f"{what} is {size}; this runtime needs a multiple of 16")
    isa = select()
    small = Small(**small_tensors(source))
    # The embedding first: while it is copied both copies count, and nothing else is there yet.
    embedding, head_block = _one(source, "token_embd.weight", preset)
    head, head_block = (embedding, head_block) if source.tied else _one(source, "output.weight", preset)
    in_proj, in_block = _layers(source, "ssm_in", c.d_in_proj, c.d_model, preset)
    out_proj, out_block = _layers(source, "ssm_out", c.d_model, c.d_inner, preset)
    dims = dims_of(c, in_block, out_block, head_block)
    return Built(isa, preset.activations, preset.state, dims, small, embedding, in_proj, out_proj, head)


def _layers(source: Source, suffix: str, n: int, k: int, preset: Preset) -> tuple[Packed, int]:
    """One projection of all layers, and how many of its activations share a scale."""
    names = [f"blk.{i}.{suffix}.weight" for i in range(source.config.n_layer)]
    first = source.packed(names[0])
    blocks = {source.activation_block(name, preset) for name in names}
    block = min(blocks)
    if len(blocks) > 1 or k % block:
        raise GGUFError(f"{names[0]}: rows of {k} do not divide into activation blocks of {sorted(blocks)}")
    try:
        expect(first, n, k, block, names[0])
    except ValueError as error:
        raise GGUFError(str(error)) from None
    stacked = empty_stack(len(names), first)

    def fill(layer: int) -> None:
        put(stacked, layer, source.packed(names[layer]) if layer else first, names[layer])

    try:
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(fill, range(len(names))))
    except ValueError as error:
        raise GGUFError(str(error)) from None
    return stacked, block


def _one(source: Source, name: str, preset: Preset) -> tuple[Packed, int]:
    """The embedding or the head, and how many activations share a scale when it is multiplied."""
    packed, c, block = source.packed(name), source.config, source.activation_block(name, preset)
    try:
        expect(packed, c.vocab_size, c.d_model, block, name)
    except ValueError as error:
        raise GGUFError(str(error)) from None
    return type(packed)(*(array[None] for array in packed)), block
