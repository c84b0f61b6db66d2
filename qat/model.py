"""Mamba-2 in torch: parameters named as in Hugging Face's `Mamba2ForCausalLM`, arithmetic of `mamba_ssm`.

The equations: Dao and Gu 2024, arXiv 2405.21060, section 7. With n_groups > 1 the gated norm works per group, as in
mamba_ssm. Checkpoints go in and out through `tmexport.checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat.ssd import choose_scan
from tmexport.checkpoint import open_checkpoint
from tmexport.config import Mamba2Config

_DT_RANGE = (0.001, 0.1)  # mamba_ssm's range for the initial time steps


def default_chunk(device: torch.device) -> int:
    """Positions a chunk of the scan: shorter suits a CPU's caches, longer a GPU's matrix units (measured on a CPU)."""
    return 32 if device.type == "cpu" else 256


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _GatedNorm(torch.autograd.Function):
    """u / rms(u) * weight with u = y * silu(z), the rms over each of `groups` parts of the last axis; fp32 inside.

    The backward is written out: it passes over its tensors half as often as the derived one, and keeps fewer of them.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
        gate = F.silu(z)
        u = (y * gate).float().unflatten(-1, (groups, -1))
        inverse = torch.linalg.vector_norm(u, dim=-1, keepdim=True).square_().div_(u.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(y, z, gate, weight, inverse)
        return u.mul_(inverse).flatten(-2).mul_(weight).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, z, gate, weight, inverse = ctx.saved_tensors
        split = (inverse.shape[-2], -1)
        grad = grad.float()
        normal = (y * gate).float().unflatten(-1, split).mul_(inverse)
        product = normal.flatten(-2) * grad
        grad_weight = product.flatten(0, -2).sum(0)
        shared = torch.einsum("...gk,gk->...g", product.unflatten(-1, split), weight.float().view(split))[..., None]
        grad_u = (grad * weight).unflatten(-1, split)
        grad_u = grad_u.addcmul_(normal, shared, value=-1 / normal.shape[-1]).mul_(inverse).flatten(-2).to(y.dtype)
        return grad_u * gate, torch.ops.aten.silu_backward(grad_u.mul_(y), z), grad_weight.to(weight.dtype), None, None


class GatedNorm(nn.Module):
    """RMSNorm of y * silu(z), over each of `groups` equal parts of the last axis."""

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return _GatedNorm.apply(y, z, self.weight, self.eps, self.groups)


class _ConvSilu(torch.autograd.Function):
    """silu(bias + sum over taps of weight[:, tap] * padded[:, time + tap]), [batch, time + kernel - 1, channels] in.

    Shifted multiply-adds in the layout at hand, with the backward written out: on a CPU twice as quick as the same
    through autograd or the library's grouped convolution, which wants the channels outside.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        taps = weight[:, 0].t().to(padded.dtype)
        time = padded.shape[1] - len(taps) + 1
        y = torch.addcmul(bias.to(padded.dtype), padded[:, :time], taps[0])
        for tap in range(1, len(taps)):
            y.addcmul_(padded[:, tap : tap + time], taps[tap])
        ctx.save_for_backward(padded, weight, y)
        return F.silu(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, weight, y = ctx.saved_tensors
        taps, time = weight[:, 0].t().to(padded.dtype), y.shape[1]
        grad = torch.ops.aten.silu_backward(grad, y)
        grad_padded = torch.zeros_like(padded)
        for tap in range(len(taps)):
            grad_padded[:, tap : tap + time].addcmul_(grad, taps[tap])
        grad_taps = [(padded[:, tap : tap + time] * grad).sum((0, 1)) for tap in range(len(taps))]
        return grad_padded, torch.stack(grad_taps, 1)[:, None].to(weight.dtype), grad.sum((0, 1)).to(weight.dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution over time and SiLU; weight [channels, 1, kernel], bias [channels]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.uniform_(self.weight, -1 / math.sqrt(kernel), 1 / math.sqrt(kernel))

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[batch, time, channels] -> the same shape, and the kernel - 1 inputs that the next call needs as `before`."""
        keep = self.weight.shape[2] - 1
        padded = F.pad(x, (0, 0, keep, 0)) if before is None else torch.cat([before, x], 1)
        return _ConvSilu.apply(padded, self.weight, self.bias), padded[:, padded.shape[1] - keep :]


@dataclass
class LayerState:
    """What one layer remembers: the last d_conv - 1 inputs of the convolution and the state of every head.

    conv: [batch, d_conv - 1, conv_dim]; ssm: fp32 [batch, heads, d_state, headdim].
    """

    conv: Tensor | None = None
    ssm: Tensor | None = None


class Mixer(nn.Module):
    """A Mamba-2 mixer, [batch, time, d_model] -> the same shape."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(config.d_model, config.d_in_proj, bias=False)
        self.conv1d = CausalConv(config.conv_dim, config.d_conv)
        low, high = (math.log(limit) for limit in _DT_RANGE)
        dt = torch.exp(torch.rand(config.n_heads) * (high - low) + low)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.log(torch.empty(config.n_heads).uniform_(1, 16)))
        self.D = nn.Parameter(torch.ones(config.n_heads))
        self.scanned = nn.Identity()  # a place for hooks: the scan's output [batch, time, heads, headdim]
        self.norm = GatedNorm(config.d_inner, config.rms_eps, config.n_groups)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        nn.init.normal_(self.out_proj.weight, std=0.5 / math.sqrt(config.d_inner * config.n_layer))

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> Tensor:
        config = self.config
        bc = config.n_groups * config.d_state
        z, xbc, dt = self.in_proj(hidden).split([config.d_inner, config.conv_dim, config.n_heads], -1)
        xbc, recent = self.conv1d(xbc, state.conv if state else None)
        x, b, c = xbc.split([config.d_inner, bc, bc], -1)
        x = x.unflatten(-1, (config.n_heads, config.headdim))
        y, last = choose_scan(hidden.device)(
            x,
            F.softplus(dt.float() + self.dt_bias),
            -torch.exp(self.A_log.float()),
            b.unflatten(-1, (config.n_groups, config.d_state)),
            c.unflatten(-1, (config.n_groups, config.d_state)),
            self.D.float(),
            default_chunk(hidden.device),
            state.ssm if state else None,
        )
        if state is not None:
            state.conv, state.ssm = recent, last
        return self.out_proj(self.norm(self.scanned(y).flatten(-2), z))


class Block(nn.Module):
    """hidden + mixer(norm(hidden)); the residual stream is fp32."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.rms_eps)
        self.mixer = Mixer(config)

    def forward(self, hidden: Tensor, state: LayerState | None = None) -> Tensor:
        return hidden + self.mixer(self.norm(hidden), state).float()


class Backbone(nn.Module):
    """Token ids [batch, time] -> normalised hidden states fp32 [batch, time, d_model]."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.rms_eps)
        self.checkpoint_activations = False  # keep only each layer's input and recompute the rest when training

    def forward(self, ids: Tensor, states: Sequence[LayerState] | None = None) -> Tensor:
        """`states`: one a layer; read as what precedes `ids`, and updated in place."""
        hidden = self.embeddings(ids).float()
        for index, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden, states[index] if states is not None else None)
        return self.norm_f(hidden)


class Mamba2LM(nn.Module):
    """A Mamba-2 language model. A tied head has no parameter of its own."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, d_model]."""
        return self.backbone.embeddings.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, ids: Tensor, states: Sequence[LayerState] | None = None) -> Tensor:
        """Logits [batch, time, vocab_size] of the next token; ids int64 [batch, time]; `states` as in Backbone."""
        return F.linear(self.backbone(ids, states), self.head_weight)

    def fresh_states(self) -> list[LayerState]:
        """The states before the first token."""
        return [LayerState() for _ in range(self.config.n_layer)]

    def ternary_modules(self) -> dict[str, nn.Linear]:
        """The projections that become ternary, by the name of their module."""
        return {name: module for name, module in self.named_modules() if name.endswith(("in_proj", "out_proj"))}  # type: ignore[misc]


def load_model(folder: Path | str) -> Mamba2LM:
    """The model in a checkpoint folder of any dialect, fp32; ternary weights come back dequantised.

    Raises:
        TmexportError: from `tmexport.checkpoint`, if the folder is not a complete checkpoint.
    """
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        model = Mamba2LM(checkpoint.config)
    state = {name: torch.from_numpy(np.array(checkpoint.dense(name), np.float32)) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
