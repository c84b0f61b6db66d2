"""A Mamba-2 mixer out of an attention's weights: V becomes x, K becomes B, Q becomes C, a group of B and C a query head.

y_t = sum over s of (C_t . B_s) decay^(t - s) dt x_s is attention without the softmax and without positions: what decays stands
in for them, and the gated norm for the softmax's sum. Of the heads of a group the first ones forget slowly, the last ones fast.

- RoPE is left out: it turns q and k by their distance, which B and C cannot.
- The convolution starts as the identity and carries the biases, and the SiLU behind it is nearly linear in the x it sees.
- The gate is silu(z), and z has no bias. It starts as the constant that a linear function of the normalised input comes nearest
  to, the same in all channels of a group, so that the norm divides it out again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qat.model.attention import AttentionMixer
from qat.model.mamba2 import Mamba2Mixer
from tmexport.errors import UsageError

_SLOWEST, _FASTEST = 0.01, 0.4  # decay a position, exp(-rate)
_GATE = 4.0  # z: silu is nearly the identity there
_WIDTH_OF_X = 0.3  # root mean square of what enters SiLU as x
# Of the mean of the moments' diagonal. As much as the squared rounding error of a weight, relative to it: what the fit then
# minimises is the error with weights so rounded (int4 0.006, ternary 0.2). With less, weights of hundreds cancel each other, and
# neither rounding nor a step of training leaves that alone (docs/mohawk.md).
_RIDGE = 0.03


@torch.no_grad()
def start_mixer(mixer: Mamba2Mixer, attention: AttentionMixer, inputs: Tensor) -> None:
    """Set the weights of `mixer` in place, all but out_proj, which is set to the attention's, as far as that can be copied.

    Args:
        mixer: with a group a query head of the attention and heads of its width (`qat.convert.shape.mixer_of`).
        attention: what it replaces.
        inputs: normalised hidden states [..., d_model] that the attention reads on a calibration text.
    """
    config, heads = mixer.config, attention.config.n_heads
    if config.n_groups != heads or config.headdim != attention.config.head_dim or config.d_state != config.headdim:
        raise UsageError(f"a mixer of {config.n_groups} groups cannot start from an attention of {heads} heads")
    shared, per_group = heads // attention.config.n_kv_heads, config.n_heads // heads
    flat = inputs.flatten(0, -2).float()

    def rows(weight: Tensor, repeats: int) -> Tensor:
        return weight.unflatten(0, (-1, config.headdim)).repeat_interleave(repeats, 0)

    v = rows(attention.v_proj.weight, shared)
    k, q = rows(attention.k_proj.weight, shared), rows(attention.q_proj.weight, 1)
    v_scale = _WIDTH_OF_X / _rms(flat, v)
    z = (_GATE * constant_function(flat)).expand(config.d_inner, -1)
    x = (v * v_scale).repeat_interleave(per_group, 0).flatten(0, 1)
    dt = flat.new_zeros(config.n_heads, config.d_model)
    mixer.in_proj.weight.copy_(torch.cat([z, x, k.flatten(0, 1), q.flatten(0, 1), dt]))
    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    mixer.conv1d.bias.copy_(_biases(attention, v_scale, shared, per_group))
    rate = flat.new_tensor(decay_rates(per_group)).repeat(heads)
    mixer.dt_bias.copy_(rate + torch.log(-torch.expm1(-rate)))  # the inverse of softplus
    mixer.A_log.zero_()  # A = -1: dt is the rate, and what a head sums is a mean
    mixer.D.zero_()
    o = attention.o_proj.weight.unflatten(1, (heads, -1))  # [d_model, heads, head_dim]
    mixer.out_proj.weight.copy_((o / per_group).repeat_interleave(per_group, 1).flatten(1))


def decay_rates(count: int) -> list[float]:
    """Rates a position of the heads that share a group, from slow to fast; of one alone, the middle."""
    if count == 1:
        return [math.sqrt(_SLOWEST * _FASTEST)]
    return [_SLOWEST * (_FASTEST / _SLOWEST) ** (place / (count - 1)) for place in range(count)]


def constant_function(inputs: Tensor) -> Tensor:
    """The row w for which inputs [n, width] @ w is nearest to 1, by ridge regression: fp32 [width]."""
    wide = inputs.double()
    return solve(wide.T @ wide, wide.sum(0)[:, None])[:, 0].float()


def solve(moments: Tensor, products: Tensor) -> Tensor:
    """W of least |X W - Y|^2 + ridge |W|^2 from fp64 X^T X [k, k] and X^T Y [k, n]: fp64 [k, n]."""
    ridge = _RIDGE * moments.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(
        moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device), products
    )


def _rms(inputs: Tensor, rows: Tensor) -> Tensor:
    """Root mean square of each head's outputs; rows [heads, width, d_model] -> [heads, 1, 1]."""
    moments = inputs.T @ inputs / len(inputs)
    square = torch.einsum("hwd,de,hwe->h", rows, moments, rows) / rows.shape[1]
    return square.clamp_min(1e-12).sqrt()[:, None, None]


def _biases(attention: AttentionMixer, v_scale: Tensor, shared: int, per_group: int) -> Tensor:
    """Of the convolution's channels x, B and C: those of v, k and q."""
    if not attention.config.bias:
        return v_scale.new_zeros(())
    width = attention.config.head_dim

    def heads(bias: Tensor, repeats: int) -> Tensor:
        return bias.unflatten(0, (-1, width)).repeat_interleave(repeats, 0)

    v = heads(attention.v_proj.bias, shared) * v_scale[..., 0]
    k, q = heads(attention.k_proj.bias, shared), heads(attention.q_proj.bias, 1)
    return torch.cat([v.repeat_interleave(per_group, 0).flatten(), k.flatten(), q.flatten()])
