"""Attention for one token. H heads of queries and G of keys and values, D = head_dim; T positions with this one."""

from __future__ import annotations

import numpy as np

from runtime_ref.arithmetic import Preset
from runtime_ref.reference.functions import exp, sum16
from runtime_ref.reference.products import matmul
from runtime_ref.weights import BranchWeights
from tmexport.model.branches.attention import Attention
from tmexport.model.rope import angles


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """RoPE of x [heads, D]: element i with i + D / 2."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: np.float32) -> np.ndarray:
    """What H heads q [H, D] read of keys and values [G, T, D], H / G heads of the same: [H, D]. Each head sums by itself."""
    groups, _, width = keys.shape
    score = sum16(q.reshape(groups, -1, 1, width) * keys[:, None]) * scale
    e = exp(score - score.max(axis=-1, keepdims=True))
    p = e / sum16(e)[..., None]
    total = np.zeros((*p.shape[:2], width), np.float32)
    for position in range(p.shape[-1]):
        total = total + p[:, :, position, None] * values[:, None, position]
    return total.reshape(-1, width)


def mix(
    weights: BranchWeights, x: np.ndarray, state: dict[str, np.ndarray], preset: Preset, eps: float, position: int
) -> np.ndarray:
    """What attention adds for the normed x [d]; state: k and v [T - 1, G, D] in the preset's cache format, which grow by one position."""
    c, m, v = weights.branch, weights.matrices, weights.vectors
    assert isinstance(c, Attention)

    def projected(name: str) -> np.ndarray:
        y = matmul(m[f"{name}_proj"], x, preset.activations)
        return y + v[f"{name}_bias"] if c.bias else y

    q, k, value = (projected(name).reshape(-1, c.head_dim) for name in ("q", "k", "v"))
    if c.rope_theta is not None:
        cos, sin = angles(c.rope_theta, c.head_dim, position)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    for name, row in (("k", k), ("v", value)):
        stored = np.concatenate([state[name], np.zeros((1, *row.shape), state[name].dtype)])
        stored[-1] = row
        state[name] = stored
    keys, values = (preset.cache.read(state[name]) for name in ("k", "v"))

    out = attend(q, keys.transpose(1, 0, 2), values.transpose(1, 0, 2), np.float32(c.scale))
    y = matmul(m["o_proj"], out.reshape(-1), preset.activations)
    return y + v["o_bias"] if c.bias else y
