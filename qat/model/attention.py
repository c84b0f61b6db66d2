"""Causal attention in torch: parameters named as in Hugging Face's `LlamaAttention`; grouped queries, RoPE or no positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.model.branch import BranchModule
from tmexport.model.branches.attention import Attention


@dataclass
class AttentionState:
    """What one branch remembers: keys, turned to their positions, and values; [batch, kv heads, positions, head_dim]."""

    k: Tensor | None = None
    v: Tensor | None = None


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """RoPE of x [batch, heads, time, head_dim], whose first position is `start`.

    Element i and i + head_dim / 2 are turned by position * theta^(-2 i / head_dim); the angles are computed in fp64.
    """
    half = x.shape[-1] // 2
    place = torch.arange(start, start + x.shape[-2], dtype=torch.float64, device=x.device)
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = place[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = x.float().split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class AttentionMixer(BranchModule):
    """[batch, time, d_model] -> the same shape. `eps` is not used: it has no norm; `depth`: blocks of the model."""

    fresh_state = AttentionState

    def __init__(self, config: Attention, eps: float, depth: int) -> None:
        super().__init__()
        self.config = config
        inner, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.d_model, inner, bias=config.bias)
        self.k_proj = nn.Linear(config.d_model, keys, bias=config.bias)
        self.v_proj = nn.Linear(config.d_model, keys, bias=config.bias)
        self.o_proj = nn.Linear(inner, config.d_model, bias=config.bias)
        nn.init.normal_(self.o_proj.weight, std=0.5 / math.sqrt(inner * depth))

    def forward(self, hidden: Tensor, state: AttentionState | None = None) -> Tensor:
        config = self.config
        q, k, v = (self._heads(proj, hidden) for proj in (self.q_proj, self.k_proj, self.v_proj))
        start = 0 if state is None or state.k is None else state.k.shape[2]
        if config.rope_theta is not None:
            q, k = rotate(q, start, config.rope_theta), rotate(k, start, config.rope_theta)
        if state is not None:
            if state.k is not None and state.v is not None:
                k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            state.k, state.v = k, v
        time = q.shape[2]
        mask = None  # one token sees all that was
        if start > 0 and time > 1:
            mask = torch.ones(time, start + time, dtype=torch.bool, device=q.device).tril(start)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=start == 0, scale=config.scale, enable_gqa=config.n_heads != config.n_kv_heads
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _heads(self, proj: nn.Module, hidden: Tensor) -> Tensor:
        """[batch, heads, time, head_dim]."""
        return proj(hidden).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def mixing(self, hidden: Tensor) -> Tensor:
        """The probabilities: fp32 [batch, n_heads, time, time]."""
        config, time = self.config, hidden.shape[1]
        q, k = self._heads(self.q_proj, hidden), self._heads(self.k_proj, hidden)
        if config.rope_theta is not None:
            q, k = rotate(q, 0, config.rope_theta), rotate(k, 0, config.rope_theta)
        scores = (q @ k.repeat_interleave(config.n_heads // config.n_kv_heads, 1).mT).float() * config.scale
        future = torch.ones(time, time, dtype=torch.bool, device=hidden.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

    def operations(self, seq_len: int) -> int:
        """Multiplications and additions a token, forward, of the scores and the sum of the values (not of its matrices)."""
        return 2 * seq_len * self.config.n_heads * self.config.head_dim  # half of the positions on average, twice
