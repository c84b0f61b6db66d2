"""The gated MLP in torch: parameters named as in Hugging Face's `LlamaMLP`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.branch import BranchModule
from tmexport.model.branches.mlp import SwiGLU


@dataclass
class NoState:
    """An MLP remembers nothing."""


class SwiGLUMLP(BranchModule):
    """down(silu(gate(x)) * up(x)), [batch, time, d_model] -> the same shape. `eps` is not used; `depth`: blocks of the model."""

    fresh_state = NoState

    def __init__(self, config: SwiGLU, eps: float, depth: int) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False)
        nn.init.normal_(self.down_proj.weight, std=0.5 / math.sqrt(config.d_ff * depth))

    def forward(self, hidden: Tensor, state: NoState | None = None) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))

    def operations(self, seq_len: int) -> int:
        """Multiplications and additions a token, forward, of the gate (not of its matrices)."""
        return 4 * self.config.d_ff
