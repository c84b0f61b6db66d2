"""Fake-quantisers: fp32 latent weights train, their rounding to codes and scales computes; one for each kind of weight.

scale = mean|w| of the group, recomputed at every forward and rounded to fp16; the code is round(clip(w / scale, -1, 1)) of a
ternary weight (Ternary Mamba, arXiv 2606.18114; BitNet b1.58, arXiv 2402.17764) and the sign of a binary one (Bi-Mamba, arXiv
2411.11843); int8 and int4 weights take the largest weight of a block of 32 as the end of their range; the gradient passes straight through to the latent weight. The same rules as `quantize` of the kinds in
`tmexport.types`, so what is exported is bit for bit what was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.model import LanguageModel
from tmexport.errors import UsageError
from tmexport.quantization import group_for, projections_of
from tmexport.types import KINDS, Coded
from tmexport.types.base import LARGEST_SCALE, SMALLEST_SCALE


def group_scales(weight: Tensor, group_size: int, kind: str) -> Tensor:
    """The fp16 scale of every group of a weight, by the rule of its kind (a key of KINDS); [n, k] -> [n, k / group_size]."""
    return _RULES[kind].scale(weight.detach().float().unflatten(-1, (-1, group_size)))


def _mean_scale(grouped: Tensor) -> Tensor:
    """mean|w|, clamped to the positive normal fp16 numbers."""
    return grouped.abs().mean(-1).clamp(float(SMALLEST_SCALE), float(LARGEST_SCALE)).to(torch.float16)


def _block_scale(extreme: Tensor, steps: int) -> Tensor:
    """extreme / steps, clamped to the finite fp16 numbers; +0 for -0."""
    largest = float(LARGEST_SCALE)
    return (extreme / steps).clamp(-largest, largest).to(torch.float16) + 0


def _int4_scale(grouped: Tensor) -> Tensor:
    """(the weight of largest magnitude) / -8; of +a and -a it is -a."""
    high, low = grouped.amax(-1), grouped.amin(-1)
    return _block_scale(torch.where(high > -low, high, low), -8)


def _ternary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """round(clip(w / scale, -1, 1)), halves to even."""
    return (weight / scale).clamp_(-1, 1).round_()


def _binary_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """The sign, +1 for 0."""
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


def _block_codes(low: int, high: int) -> Callable[[Tensor, Tensor], Tensor]:
    """round(w / scale), halves to even, in low..high; 0 where the scale is 0."""

    def codes(weight: Tensor, scale: Tensor) -> Tensor:
        return torch.where(scale == 0, 0.0, weight / scale).round_().clamp_(low, high)

    return codes


@dataclass(frozen=True)
class Rule:
    """How a kind rounds. scale: weights [..., group_size] -> fp16 [...]; codes: (weight, scale) -> numbers of the weight's dtype."""

    scale: Callable[[Tensor], Tensor]
    codes: Callable[[Tensor, Tensor], Tensor]


_RULES = {
    "ternary": Rule(_mean_scale, _ternary_codes),
    "binary": Rule(_mean_scale, _binary_codes),
    "int8": Rule(lambda grouped: _block_scale(grouped.abs().amax(-1), 127), _block_codes(-127, 127)),
    "int4": Rule(_int4_scale, _block_codes(-8, 7)),
}


def round_to_codes(kind: str, weight: Tensor, scale: Tensor) -> Tensor:
    """The code of every weight, as numbers of the weight's dtype; `scale` broadcasts against it. kind: a key of KINDS."""
    return _RULES[kind].codes(weight, scale)


def group_codes(weight: Tensor, scales: Tensor, group_size: int, kind: str) -> Tensor:
    """The codes as fp32 [n, k / group_size, group_size]."""
    grouped = weight.detach().float().unflatten(-1, (-1, group_size))
    return round_to_codes(kind, grouped, scales.float()[..., None])


# An operator of its own, so that torch.compile leaves it whole: inductor takes the rounding of a scale to fp16 and back for
# superfluous, and would train other weights than are exported.
@torch.library.custom_op("tmexport::fake_quantize", mutates_args=())
def _fake_quantize(weight: Tensor, group_size: int, kind: str) -> Tensor:
    """Forward: code * scale, exactly, fp32. Backward: the identity."""
    scales = group_scales(weight, group_size, kind)
    return group_codes(weight, scales, group_size, kind).mul_(scales.float()[..., None]).flatten(-2)


_fake_quantize.register_fake(lambda weight, group_size, kind: torch.empty_like(weight, dtype=torch.float32))
_fake_quantize.register_autograd(lambda ctx, grad: (grad, None, None))


class FakeQuantizer(nn.Module):
    """Parametrization of a `weight` [n, k]: the latent fp32 weight goes in, code * scale (fp32) comes out."""

    kind: ClassVar[str]

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        return _fake_quantize(weight, self.group_size, self.kind)

    def scales(self, latent: Tensor) -> Tensor:
        """fp16 [n, k / group_size]."""
        return group_scales(latent, self.group_size, self.kind)

    @torch.no_grad()
    def quantize(self, latent: Tensor) -> Coded:
        """The codes and scales that `forward` uses for this latent weight."""
        scales = self.scales(latent)
        codes = group_codes(latent, scales, self.group_size, self.kind).flatten(-2).to(torch.int8)
        return KINDS[self.kind].tensor(codes.cpu().numpy(), scales.cpu().numpy(), self.group_size)


class TernaryWeight(FakeQuantizer):
    """Codes -1, 0 and 1."""

    kind = "ternary"


class BinaryWeight(FakeQuantizer):
    """Codes -1 and 1."""

    kind = "binary"


class Int8Weight(FakeQuantizer):
    """Codes -127 to 127."""

    kind = "int8"


class Int4Weight(FakeQuantizer):
    """Codes -8 to 7."""

    kind = "int4"


QUANTIZERS: dict[str, type[FakeQuantizer]] = {q.kind: q for q in (TernaryWeight, BinaryWeight, Int8Weight, Int4Weight)}


@torch.library.custom_op("tmexport::round_through", mutates_args=())
def _round_through(x: Tensor, to_half: bool) -> Tensor:
    """Round to whole numbers, or to fp16; the gradient passes straight through. An operator for the same reason."""
    return x.to(torch.float16).float() if to_half else x.round()


_round_through.register_fake(lambda x, to_half: torch.empty_like(x))
_round_through.register_autograd(lambda ctx, grad: (grad, None))


class LearnedTernaryWeight(TernaryWeight):
    """The same with a scale that is a parameter, started at mean|w|; here only to reproduce the zero-ratio collapse.

    The gradients are those of code * scale with the rounding passed straight through, as in LSQ (Esser et al. 2020,
    arXiv 1902.08153): code - w / scale for a weight inside the clipping range, code outside.
    """

    def __init__(self, group_size: int, weight: Tensor) -> None:
        super().__init__(group_size)
        self.scale = nn.Parameter(group_scales(weight, group_size, self.kind).float())

    def _rounded_scale(self) -> Tensor:
        return _round_through(self.scale.clamp(float(SMALLEST_SCALE), float(LARGEST_SCALE)), True)

    def forward(self, weight: Tensor) -> Tensor:
        scale = self._rounded_scale()[..., None]
        codes = _round_through((weight.unflatten(-1, (-1, self.group_size)) / scale).clamp(-1, 1), False)
        return (codes * scale).flatten(-2)

    def scales(self, latent: Tensor) -> Tensor:
        return self._rounded_scale().detach().to(torch.float16)


def make_low_bit(
    model: LanguageModel,
    kind: str,
    group_size: int,
    learned_scale: bool = False,
    ternary_embedding: bool = False,
    projections: str = "all",
    rest: str = "dense",
) -> LanguageModel:
    """Put a fake-quantiser of a kind on projections of `model`, and of another on the others, in place.

    Args:
        model: changed and returned.
        kind: a key of QUANTIZERS, or dense: the projections stay as they are.
        group_size: weights that share a scale; 0: the widest that fits the rows of each.
        learned_scale: ternary only: the scales are parameters.
        ternary_embedding: the embedding and the head become ternary too (Slender-Mamba), in groups of the same size.
        projections: which (`tmexport.quantization.projections_of`).
        rest: the kind of the other projections, in its widest groups; or dense.

    Raises:
        UsageError: the group size is none of the kind's, or does not divide the rows; or the scale of a binary weight is learned.
    """
    if learned_scale and kind != "ternary":
        raise UsageError(f"--learned-scale studies ternary weights, not {kind} ones; leave it out")
    if kind == "dense" and ternary_embedding:
        raise UsageError("--ternary-embedding goes with --weights ternary or binary; dense weights are the control")
    chosen = projections_of(model.config, projections)
    for name, module in model.projections().items():
        if f"{name}.weight" not in chosen:
            if rest != "dense":
                _attach(module, name, rest, 0)
        elif kind != "dense":
            _attach(module, name, kind, group_size, learned_scale)
    if ternary_embedding:
        _attach(model.backbone.embeddings, "the embedding", "ternary", group_size)
        if not model.config.tie_embeddings:
            _attach(model.lm_head, "the head", "ternary", group_size)
    return model


def _attach(
    module: nn.Linear | nn.Embedding, name: str, kind: str, group_size: int, learned_scale: bool = False
) -> None:
    group_size = group_for(kind, group_size or None, name, module.weight.shape[1])
    quantiser = LearnedTernaryWeight(group_size, module.weight) if learned_scale else QUANTIZERS[kind](group_size)
    parametrize.register_parametrization(module, "weight", quantiser)


def _quantized(model: LanguageModel) -> dict[str, parametrize.ParametrizationList]:
    """The latent weight and the fake-quantiser of each module that has one, by its name, in the order of the file."""
    names = [name.removesuffix(".weight") for name, tensor in model.config.tensors.items() if tensor.low_bit]
    modules = {name: model.get_submodule(name) for name in names}
    return {
        name: cast(parametrize.ParametrizationList, module.get_submodule("parametrizations.weight"))
        for name, module in modules.items()
        if parametrize.is_parametrized(module, "weight")
    }


def quantized_weights(model: LanguageModel) -> dict[str, Coded]:
    """Codes and scales of every low-bit weight of `model`, by its Hugging Face name."""
    return {
        f"{name}.weight": cast(FakeQuantizer, weight[0]).quantize(weight.original)
        for name, weight in _quantized(model).items()
    }


@torch.no_grad()
def zero_ratios(model: LanguageModel) -> dict[str, float]:
    """Share of zero codes of every low-bit weight, by the name of its module."""
    return {
        name: 1.0 - torch.count_nonzero(weight()).item() / weight.original.numel()
        for name, weight in _quantized(model).items()
    }


def model_tensors(model: LanguageModel) -> dict[str, np.ndarray | Coded]:
    """Every tensor of a model by its Hugging Face name: codes and scales where it is fake-quantised, else fp32."""
    tensors: dict[str, np.ndarray | Coded] = {**quantized_weights(model)}
    for name in model.config.tensors:
        if name not in tensors:
            tensors[name] = model.get_parameter(name).detach().float().cpu().numpy()
    return tensors
