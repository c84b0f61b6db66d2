"""A whole model, one token at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime_ref.arithmetic import preset_of
from runtime_ref.reference import attention, mamba1, mamba2, swiglu
from runtime_ref.reference.functions import rms_norm
from runtime_ref.reference.products import matmul
from runtime_ref.state import branch_state_arrays
from runtime_ref.weights import Weights

BRANCHES: dict[str, Any] = {  # a file a kind: mix
    "mamba1": mamba1,
    "mamba2": mamba2,
    "attention": attention,
    "swiglu": swiglu,
}


@dataclass
class ReferenceState:
    """Of each branch, in the model's order: its arrays by the names of its table; tokens: how many were read."""

    branches: list[dict[str, np.ndarray]]
    tokens: int = 0


class ReferenceModel:
    """The specification as an object: `logits = model.step(state, token)`."""

    def __init__(self, weights: Weights, profile: str) -> None:
        self.weights, self.preset = weights, preset_of(profile)

    def new_state(self) -> ReferenceState:
        """The state before the first token."""
        found = []
        for block in self.weights.config.blocks:
            for branch in block.branches:
                arrays = branch_state_arrays(branch, self.preset)
                found.append({a.name: np.zeros((0, *a.shape) if a.grows else a.shape, a.dtype) for a in arrays})
        return ReferenceState(found)

    def step(self, state: ReferenceState, token: int) -> np.ndarray:
        """Logits fp32 [vocab] after `token`; the state is updated in place."""
        w, c, eps = self.weights, self.weights.config, self.weights.config.rms_eps
        states = iter(state.branches)
        with np.errstate(over="ignore", invalid="ignore"):
            x = scaled(w.embedding.row(token), c.embedding_multiplier)
            for block, described in zip(w.blocks, c.blocks, strict=True):
                normed = rms_norm(x, block.norm, eps)
                total: np.ndarray | None = None
                for branch in block.branches:
                    out = BRANCHES[branch.branch.kind].mix(branch, normed, next(states), self.preset, eps, state.tokens)
                    total = out if total is None else total + out
                assert total is not None
                x = x + scaled(total, described.multiplier)
            state.tokens += 1
            logits = matmul(w.head, rms_norm(x, w.norm_f, eps), self.preset.activations)
            return logits if c.logits_divisor == 1.0 else logits / np.float32(c.logits_divisor)


def scaled(values: np.ndarray, multiplier: float) -> np.ndarray:
    """Times a multiplier rounded to fp32; 1 leaves all as it is."""
    return values if multiplier == 1.0 else values * np.float32(multiplier)
