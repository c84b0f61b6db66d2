"""The ternary fake-quantiser: fp32 latent weights train, their ternary rounding computes.

scale = mean|w| of the group, recomputed at every forward and rounded to fp16; code = round(clip(w / scale, -1, 1)); the
gradient passes straight through to the latent weight (Ternary Mamba, arXiv 2606.18114; BitNet b1.58, arXiv 2402.17764).
The same convention as `tmexport.types.ternary.quantize_absmean`, so what is exported is bit for bit what was trained.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.model import LanguageModel
from tmexport.errors import UsageError
from tmexport.types.base import LARGEST_SCALE, SMALLEST_SCALE
from tmexport.types.ternary import GROUP_SIZES, TernaryTensor


def group_scales(weight: Tensor, group_size: int) -> Tensor:
    """mean|w| of every group as fp16, clamped to the positive normal fp16 numbers; [n, k] -> [n, k / group_size]."""
    grouped = weight.detach().float().unflatten(-1, (-1, group_size))
    mean = grouped.abs().mean(-1)
    return mean.clamp(float(SMALLEST_SCALE), float(LARGEST_SCALE)).to(torch.float16)


def group_codes(weight: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """round(clip(w / scale, -1, 1)), halves to even, as fp32 [n, k / group_size, group_size]."""
    grouped = weight.detach().float().unflatten(-1, (-1, group_size))
    return (grouped / scales.float()[..., None]).clamp_(-1, 1).round_()


class _StraightThrough(torch.autograd.Function):
    """Forward: code * scale, exactly. Backward: the identity."""

    @staticmethod
    def forward(ctx: object, weight: Tensor, group_size: int) -> Tensor:
        scales = group_scales(weight, group_size)
        return group_codes(weight, scales, group_size).mul_(scales.float()[..., None]).flatten(-2)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class TernaryWeight(nn.Module):
    """Parametrization of a `weight` [n, k]: the latent fp32 weight goes in, code * scale (fp32) comes out."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        return _StraightThrough.apply(weight, self.group_size)

    def quantize(self, latent: Tensor) -> TernaryTensor:
        """The codes and scales that `forward` uses for this latent weight."""
        scales = group_scales(latent, self.group_size)
        codes = group_codes(latent, scales, self.group_size).flatten(-2).to(torch.int8)
        return TernaryTensor(codes.cpu().numpy(), scales.cpu().numpy(), self.group_size)


class _RoundThrough(torch.autograd.Function):
    """Round to whole numbers, or to fp16; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor, to_half: bool) -> Tensor:
        return x.to(torch.float16).float() if to_half else x.round()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class LearnedTernaryWeight(TernaryWeight):
    """The same with a scale that is a parameter, started at mean|w|; here only to reproduce the zero-ratio collapse.

    The gradients are those of code * scale with the rounding passed straight through, as in LSQ (Esser et al. 2020,
    arXiv 1902.08153): code - w / scale for a weight inside the clipping range, code outside.
    """

    def __init__(self, group_size: int, weight: Tensor) -> None:
        super().__init__(group_size)
        self.scale = nn.Parameter(group_scales(weight, group_size).float())

    def _rounded_scale(self) -> Tensor:
        return _RoundThrough.apply(self.scale.clamp(float(SMALLEST_SCALE), float(LARGEST_SCALE)), True)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self._rounded_scale()[..., None]
        codes = _RoundThrough.apply((weight.unflatten(-1, (-1, self.group_size)) / scale).clamp(-1, 1), False)
        return (codes * scale).flatten(-2)

    @torch.no_grad()
    def quantize(self, latent: Tensor) -> TernaryTensor:
        scales = self._rounded_scale().to(torch.float16)
        codes = group_codes(latent, scales, self.group_size).flatten(-2).to(torch.int8)
        return TernaryTensor(codes.cpu().numpy(), scales.cpu().numpy(), self.group_size)


def make_ternary(model: LanguageModel, group_size: int, learned_scale: bool = False) -> LanguageModel:
    """Put a fake-quantiser on every in_proj and out_proj of `model`, in place.

    Raises:
        UsageError: the group size is not 64, 128 or 256, or does not divide the rows.
    """
    if group_size not in GROUP_SIZES:
        raise UsageError(f"group size {group_size} is not supported; expected 64, 128 or 256")
    for name, module in model.projections().items():
        if module.in_features % group_size:
            raise UsageError(
                f"{name} has rows of {module.in_features} weights, not a multiple of the group size {group_size}; "
                "choose a smaller --group-size"
            )
        quantiser = LearnedTernaryWeight(group_size, module.weight) if learned_scale else TernaryWeight(group_size)
        parametrize.register_parametrization(module, "weight", quantiser)
    return model


def quantized_weights(model: LanguageModel) -> dict[str, TernaryTensor]:
    """Codes and scales of every ternary weight of `model`, by its Hugging Face name."""
    return {
        f"{name}.weight": module.parametrizations.weight[0].quantize(module.parametrizations.weight.original)  # type: ignore[union-attr,index,operator,arg-type]
        for name, module in model.projections().items()
        if parametrize.is_parametrized(module, "weight")
    }


@torch.no_grad()
def zero_ratios(model: LanguageModel) -> dict[str, float]:
    """Share of zero codes of every ternary weight, by the name of its module."""
    ratios = {}
    for name, module in model.projections().items():
        if parametrize.is_parametrized(module, "weight"):
            ratios[name] = 1.0 - torch.count_nonzero(module.weight).item() / module.weight.numel()
    return ratios


def model_tensors(model: LanguageModel) -> dict[str, np.ndarray | TernaryTensor]:
    """Every tensor of a model by its Hugging Face name: codes and scales where it is fake-quantised, else fp32."""
    tensors: dict[str, np.ndarray | TernaryTensor] = {**quantized_weights(model)}
    for name in model.config.tensors:
        if name not in tensors:
            tensors[name] = model.get_parameter(name).detach().float().cpu().numpy()
    return tensors
