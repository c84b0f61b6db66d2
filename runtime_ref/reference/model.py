"""A whole model, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime_ref.arithmetic import preset_of
from runtime_ref.reference import mamba1, mamba2
from runtime_ref.reference.functions import rms_norm
from runtime_ref.reference.products import embed, matmul
from runtime_ref.state import branch_state_arrays
from runtime_ref.weights import Weights

BRANCHES: dict[str, Any] = {"mamba1": mamba1, "mamba2": mamba2}  # a file a kind: mix

ReferenceState = list[
    dict[str, np.ndarray]
]  # of each branch, in the model's order: its arrays by the names of its table


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
                found.append({a.name: np.zeros(a.shape, a.dtype) for a in arrays})
        return found

    def step(self, state: ReferenceState, token: int) -> np.ndarray:
        """Logits fp32 [vocab] after `token`; the state is updated in place."""
        w, eps = self.weights, self.weights.config.rms_eps
        states = iter(state)
        with np.errstate(over="ignore", invalid="ignore"):
            x = embed(w.embedding, token)
            for block in w.blocks:
                normed = rms_norm(x, block.norm, eps)
                for branch in block.branches:
                    x = x + BRANCHES[branch.branch.kind].mix(branch, normed, next(states), self.preset, eps)
            return matmul(w.head, rms_norm(x, w.norm_f, eps), self.preset.activations)
