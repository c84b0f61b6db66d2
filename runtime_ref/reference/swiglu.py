"""The gated MLP for one token."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.reference.functions import silu
from runtime_ref.reference.products import matmul
from runtime_ref.weights import BranchWeights


def mix(
    weights: BranchWeights, x: np.ndarray, state: dict[str, np.ndarray], preset: Preset, eps: float, position: int
) -> np.ndarray:
    """What the MLP adds for the normed x [d]; it has no state."""
    gate, up = (matmul(weights.matrices[role], x, preset.activations) for role in ("gate_proj", "up_proj"))
    return matmul(weights.matrices["down_proj"], silu(gate) * up, preset.activations)
