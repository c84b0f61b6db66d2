"""Corrections of a rounded model by terms that a checkpoint of ours cannot hold: in torch only, to be measured.

Every function takes the teacher and calibration ids [n, seq_len], and returns a model whose projections are rounded to ternary.

- bias_correction: adds the mean error of each projection's output (Nagel et al. 2019, arXiv 1906.04721).
- james_stein: the same, the means shrunk towards zero by the positive-part James-Stein factor.
- kalman: multiplies each head's output of the scan by the gain that best predicts the teacher's from the student's: the
  scalar, steady-state form of a Kalman correction of the state (the teacher's state is not observable when serving).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.model import LanguageModel
from tmexport.types.ternary import quantize_absmean


@torch.no_grad()
def rounded(teacher: LanguageModel, group_size: int) -> LanguageModel:
    """A copy with every projection rounded to nearest."""
    model = copy.deepcopy(teacher)
    for module in model.projections().values():
        module.weight.copy_(torch.from_numpy(quantize_absmean(module.weight.numpy(), group_size).dense()))
    return model


@torch.no_grad()
def bias_correction(teacher: LanguageModel, ids: Tensor, group_size: int, shrink: bool = False) -> LanguageModel:
    """The mean error of every projection's output, taken back by a bias."""
    inputs = _gather_inputs(teacher, ids)
    model = rounded(teacher, group_size)
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
    model = rounded(teacher, group_size)
    wanted, found = _gather_scans(teacher, ids), _gather_scans(model, ids)
    for scanned, want, have in zip(_scanned(model), wanted, found, strict=True):
        gain = (want * have).sum((0, 1, 3)) / have.square().sum((0, 1, 3)).clamp_min(1e-12)
        scanned.register_forward_hook(lambda _m, _i, y, gain=gain: y * gain[:, None])
    return model


CORRECTIONS: dict[str, Callable[[LanguageModel, Tensor, int], LanguageModel]] = {
    "bias correction": bias_correction,
    "James-Stein": james_stein,
    "Kalman gain": kalman,
}


def _gather_inputs(model: LanguageModel, ids: Tensor) -> dict[str, Tensor]:
    """What enters every projection: fp32 [positions, k]."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, inputs: found.__setitem__(name, inputs[0].flatten(0, -2))

    _run(model, ids, {name: keep(name) for name in model.projections()})
    return found


def _scanned(model: LanguageModel) -> list[nn.Module]:
    """The places for hooks at the scans' outputs."""
    return [getattr(branch, "scanned") for block in model.backbone.blocks for branch in block.branches]  # noqa: B009


def _gather_scans(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The scan's output of every layer: fp32 [batch, time, heads, headdim]."""
    found: list[Tensor] = []
    handles = [module.register_forward_hook(lambda _m, _i, y: found.append(y)) for module in _scanned(model)]
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
