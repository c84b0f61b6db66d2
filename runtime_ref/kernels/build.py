"""From a source of tensors to a program."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.gguf_source import check_branches
from runtime_ref.kernels import attention, mamba1, mamba2, swiglu
from runtime_ref.kernels.isa import select
from runtime_ref.kernels.layers import Arena, Layer, Multiplied, multiplied, sixteens
from runtime_ref.kernels.phases import (
    LOGITS,
    Embedding,
    Norm,
    Product,
    Scale,
    divide_logits,
    embed_rows,
    norm_rows,
    scale_rows,
    ways,
)
from runtime_ref.kernels.program import Program, Step
from runtime_ref.kernels.scratch import Room
from runtime_ref.state import branch_state_arrays
from runtime_ref.weights import Source, block_norm, final_norm
from tmexport.model import Model

BRANCHES: dict[str, Any] = {  # a file a kind: check, room, SMALL, steps
    "mamba1": mamba1,
    "mamba2": mamba2,
    "attention": attention,
    "swiglu": swiglu,
}


@dataclass(frozen=True)
class Built:
    """A model that can run.

    program: of the steps; room: what it needs of a Scratch; embedding: its matrix; weight_bytes: of weights that decoding one token reads
    (of an untied embedding, one row); fingerprint: identifies the weights.
    """

    steps: Sequence[Step]
    program: Program
    room: Room
    embedding: Multiplied
    weight_bytes: int
    fingerprint: str


def build(source: Source, preset: Preset) -> Built:
    """Pack every tensor of the model, layers on a few threads.

    Raises:
        GGUFError: damaged tensors, or types, branches and dimensions that the kernels do not compute.
    """
    c = source.config
    check_branches(c, "the model")
    sixteens("d_model", c.d_model)
    for branch in {branch for block in c.blocks for branch in block.branches}:
        BRANCHES[branch.kind].check(branch)
    # The embedding first: while it is copied both copies count, and nothing else is there yet.
    embedding = multiplied(source, "token_embd.weight", c.vocab_size, c.d_model, preset)
    head = embedding if source.tied else multiplied(source, "output.weight", c.vocab_size, c.d_model, preset)
    layers = _layers(source, preset)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        parts = list(pool.map(lambda layer: BRANCHES[layer.branch.kind].steps(layer), layers))
    norm = final_norm(source)
    few, many = ways(select(), preset.activations)
    body = [step for part in parts for step in part]
    start, number = [Step(embed_rows, Embedding(embedding.packed))], float(np.float32(c.embedding_multiplier))
    if number != 1.0:
        start.append(Step(scale_rows, Scale(number, c.d_model)))
    end = [
        Step(norm_rows(preset.activations), Norm(norm, _eps(source), head.block, c.n_layer, last=1)),
        Step(few, Product(*head, LOGITS), many),
    ]
    if c.logits_divisor != 1.0:
        end.append(Step(divide_logits, Scale(float(np.float32(c.logits_divisor)), c.vocab_size)))
    room = reduce(Room.__or__, (BRANCHES[layer.branch.kind].room(layer.branch) for layer in layers))
    steps = [*start, *body, *end]
    return Built(
        steps,
        Program(steps),
        room | Room(x=c.d_model, wide=c.d_model, sum=c.d_model if _sums(c) else 1),
        embedding,
        sum(_nbytes(step.args) for step in [*body, *end]),
        _fingerprint(source, layers, norm),
    )


def _sums(c: Model) -> bool:
    """Whether some block's sum is more than one product."""
    alone = [len(block.branches) == 1 and block.multiplier == 1.0 for block in c.blocks]
    return not all(alone) or any(getattr(branch, "bias", False) for block in c.blocks for branch in block.branches)


def _eps(source: Source) -> float:
    return float(np.float32(source.config.rms_eps))


def _layers(source: Source, preset: Preset) -> list[Layer]:
    """Every branch of the model in its order, with its place in the state (`runtime_ref.state.state_arrays`)."""
    branches = [
        (number, place, branch)
        for number, block in enumerate(source.config.blocks)
        for place, branch in enumerate(block.branches)
    ]
    slots, slot = {}, 0
    for _, _, branch in branches:
        if branch not in slots:
            slots[branch] = slot
            slot += len(branch_state_arrays(branch, preset))
    isa, arena, seen, layers = select(), Arena(), Counter[Any](), []
    for number, place, branch in branches:
        layers.append(
            Layer(source, preset, isa, arena, number, branch, place, slots[branch], seen[branch], _eps(source))
        )
        seen[branch] += 1
    return layers


def _nbytes(record: Any) -> int:
    """Bytes of the arrays in a step's arguments."""
    if isinstance(record, tuple):
        return sum(map(_nbytes, record))
    return record.nbytes if isinstance(record, np.ndarray) else 0


def _fingerprint(source: Source, layers: list[Layer], last: np.ndarray) -> str:
    """Of the small tensors: enough to tell models apart, and the same in every container."""
    digest = hashlib.sha256()
    for number in range(source.config.n_layer):
        digest.update(block_norm(source, number).data)
    digest.update(last.data)
    for branch in dict.fromkeys(layer.branch for layer in layers):
        for role in BRANCHES[branch.kind].SMALL:
            for layer in layers:
                if layer.branch == branch and role in layer.small:
                    digest.update(np.ascontiguousarray(layer.small[role]).data)
    return digest.hexdigest()[:16]
