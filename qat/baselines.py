"""Ternary without training, with calibration text: the methods that QAT is measured against.

Every function takes the teacher and calibration ids [n, seq_len], and returns a model whose projections are ternary
(scale = mean|w| of the group unless said otherwise). What each does:

- gptq: rounds a column, and corrects the columns to come for its error, as the inputs' second moments say it should be
  (Frantar et al. 2022, arXiv 2210.17323). Layers in order, each on what the rounded layers before it produce.
- awq: scales input channels by a power of their mean activation before rounding and back in the norm before the
  projection, which is exact; the power is searched (Lin et al. 2023, arXiv 2306.00978).
- sigma_delta: carries a weight's rounding error to the next weight of its row, so that errors of neighbours cancel.
- bias_correction: adds the mean error of each projection's output (Nagel et al. 2019, arXiv 1906.04721).
- james_stein: the same, the means shrunk towards zero by the positive-part James-Stein factor.
- kalman: multiplies each head's output of the scan by the gain that best predicts the teacher's from the student's: the
  scalar, steady-state form of a Kalman correction of the state (the teacher's state is not observable when serving).

The last three add terms that a checkpoint of ours cannot hold: they exist in torch only, to be measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.model import LanguageModel
from qat.quantizer import group_codes, group_scales

_DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ's code


def ternary_of(weight: Tensor, group_size: int) -> Tensor:
    """The weight rounded to nearest: fp32 [n, k]."""
    scales = group_scales(weight, group_size)
    return (group_codes(weight, scales, group_size) * scales.float()[..., None]).flatten(-2)


@torch.no_grad()
def round_to_nearest(teacher: LanguageModel, ids: Tensor, group_size: int) -> LanguageModel:
    """No data, no correction."""
    return _each_projection(teacher, lambda name, module: ternary_of(module.weight, group_size))


@torch.no_grad()
def sigma_delta(teacher: LanguageModel, ids: Tensor, group_size: int) -> LanguageModel:
    """First-order noise shaping along the inputs of every row."""

    def shape(name: str, module: nn.Linear) -> Tensor:
        weight = module.weight.clone()
        scales = group_scales(weight, group_size).float()
        error = torch.zeros_like(weight[:, 0])
        for column in range(weight.shape[1]):
            scale = scales[:, column // group_size]
            wanted = weight[:, column] + error
            weight[:, column] = (wanted / scale).clamp(-1, 1).round() * scale
            error = wanted - weight[:, column]
        return weight

    return _each_projection(teacher, shape)


@torch.no_grad()
def gptq(teacher: LanguageModel, ids: Tensor, group_size: int) -> LanguageModel:
    """Error feedback by second moments."""
    model = copy.deepcopy(teacher)
    for name, module in model.projections().items():
        moments = torch.zeros(module.in_features, module.in_features, dtype=torch.float64)

        def gather(_m: nn.Module, inputs: tuple[Tensor, ...], moments: Tensor = moments) -> None:
            x = inputs[0].flatten(0, -2).double()
            moments += x.T @ x

        _run(model, ids, {name: gather})
        module.weight.copy_(gptq_weight(module.weight, moments, group_size))
    return model


def gptq_weight(weight: Tensor, moments: Tensor, group_size: int) -> Tensor:
    """One weight fp32 [n, k], rounded with feedback; moments: fp64 [k, k], the sum of x x^T over the inputs x."""
    size = weight.shape[1]
    damping = _DAMPING * moments.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(moments + damping * torch.eye(size, dtype=moments.dtype))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work = weight.double().clone()
    scale = work[:, :1]
    for column in range(size):
        if column % group_size == 0:  # the group's scale, from its weights as corrected so far
            scale = group_scales(work[:, column : column + group_size].float(), group_size).double()
        value = work[:, column : column + 1].clone()
        work[:, column : column + 1] = (value / scale).clamp(-1, 1).round() * scale
        error = (value - work[:, column : column + 1]) / upper[column, column]
        work[:, column + 1 :] -= error * upper[column, column + 1 :]
    return work.float()


@torch.no_grad()
def awq(teacher: LanguageModel, ids: Tensor, group_size: int) -> LanguageModel:
    """Activation-aware scaling of input channels; exact in the norm that precedes each projection."""
    inputs = _gather_inputs(teacher, ids)
    model = copy.deepcopy(teacher)
    modules = dict(model.named_modules())
    for name, module in model.projections().items():
        x = inputs[name]
        size = x.abs().mean(0).clamp_min(1e-6)
        best_error, best = torch.inf, (torch.ones_like(size), ternary_of(module.weight, group_size))
        for tenth in range(11):
            factor = size ** (tenth / 10)
            factor = factor / (factor.max() * factor.min()).sqrt()
            rounded = ternary_of(module.weight * factor, group_size)
            error = ((x / factor) @ rounded.T - x @ module.weight.T).square().mean().item()
            if error < best_error:
                best_error, best = error, (factor, rounded)
        mixer = name.rsplit(".", 1)[0]
        norm = modules[f"{mixer}.norm" if name.endswith("out_proj") else f"{mixer.rsplit('.', 1)[0]}.norm"]
        norm.weight.div_(best[0])
        module.weight.copy_(best[1])
    return model


@torch.no_grad()
def bias_correction(teacher: LanguageModel, ids: Tensor, group_size: int, shrink: bool = False) -> LanguageModel:
    """The mean error of every projection's output, taken back by a bias."""
    inputs = _gather_inputs(teacher, ids)
    model = round_to_nearest(teacher, ids, group_size)
    originals = teacher.projections()
    for name, module in model.projections().items():
        errors = inputs[name] @ (originals[name].weight - module.weight).T  # [positions, rows]
        bias = errors.mean(0)
        if shrink:
            variance = (errors.var(0) / len(errors)).mean()  # of an estimated mean
            bias = bias * (1 - (len(bias) - 2) * variance / bias.square().sum()).clamp_min(0)
        module.bias = nn.Parameter(bias)
    return model


@torch.no_grad()
def james_stein(teacher: LanguageModel, ids: Tensor, group_size: int) -> LanguageModel:
    """Bias correction, shrunk."""
    return bias_correction(teacher, ids, group_size, shrink=True)


@torch.no_grad()
def kalman(teacher: LanguageModel, ids: Tensor, group_size: int) -> LanguageModel:
    """A gain for every head's output of the scan (D x included)."""
    model = round_to_nearest(teacher, ids, group_size)
    wanted, found = _gather_scans(teacher, ids), _gather_scans(model, ids)
    for layer, want, have in zip(model.backbone.layers, wanted, found, strict=True):
        gain = (want * have).sum((0, 1, 3)) / have.square().sum((0, 1, 3)).clamp_min(1e-12)
        layer.mixer.scanned.register_forward_hook(lambda _m, _i, y, gain=gain: y * gain[:, None])
    return model


METHODS: dict[str, Callable[[LanguageModel, Tensor, int], LanguageModel]] = {
    "round to nearest": round_to_nearest,
    "GPTQ-style": gptq,
    "AWQ-like": awq,
    "sigma-delta": sigma_delta,
    "bias correction": bias_correction,
    "James-Stein": james_stein,
    "Kalman gain": kalman,
}


def _each_projection(teacher: LanguageModel, change: Callable[[str, nn.Linear], Tensor]) -> LanguageModel:
    model = copy.deepcopy(teacher)
    for name, module in model.projections().items():
        module.weight.copy_(change(name, module))
    return model


def _gather_inputs(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    """What enters every projection: fp32 [positions, k]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, inputs: found.__setitem__(name, inputs[0].flatten(0, -2))

    _run(model, ids, {name: keep(name) for name in model.projections()})
    return found


def _gather_scans(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The scan's output of every layer: fp32 [batch, time, heads, headdim]."""
    found: list[Tensor] = []
    handles = [
        layer.mixer.scanned.register_forward_hook(lambda _m, _i, y: found.append(y)) for layer in model.backbone.layers
    ]
    model.backbone(ids)
    for handle in handles:
        handle.remove()
    return found


def _run(model: LanguageModel, ids: Tensor, watchers: dict[str, Callable[..., None]]) -> None:
    modules = model.projections()
    handles = [modules[name].register_forward_pre_hook(watcher) for name, watcher in watchers.items()]
    try:
        model.backbone(ids)
    finally:
        for handle in handles:
            handle.remove()
