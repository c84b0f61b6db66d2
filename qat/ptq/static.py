"""Static activation scales, simulated: a torch model whose activations are rounded to 8 bits with scales from a calibration.

Papers' kernels have them (Quamba2); no file here holds them, our runtime takes scales from the activations themselves. Rounded
are the inputs of the projections, with one scale each, and what a Mamba-2 scan reads. The state is not rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.model import LanguageModel
from qat.model.mamba2 import Mamba2Mixer
from qat.ptq.statistics import Site
from tmexport.model.branches.mamba2 import Mamba2

LEVELS = 127
Clusters = Sequence[Sequence[Sequence[int]]]  # as in the record of the transformation `sort`, of one block


def round_static(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to whole numbers of `scale`, halves to even, within -127..127 of it."""
    return (x / scale).round().clamp(-LEVELS, LEVELS) * scale


def scanned_scales(branch: Mamba2, largest: np.ndarray, per_group: bool, clusters: Clusters | None) -> np.ndarray:
    """A scale for every channel of x, B and C, fp64 [conv_dim].

    Args:
        branch: the mixer.
        largest: max|x| of every channel.
        per_group: x, and B and C of each group, have scales of their own; else one for all.
        clusters: x has one a (group, cluster of heads, cluster of channels).
    """
    top = np.full(branch.conv_dim, largest.max())
    if per_group:
        parts = [branch.d_inner] + [branch.d_state] * (2 * branch.n_groups)
        top = np.concatenate([np.full(len(p), p.max()) for p in np.split(largest, np.cumsum(parts)[:-1])])
    first = 0
    for group in clusters or ():
        for heads, *sizes in group:
            own = largest[first : first + heads * branch.headdim].reshape(heads, branch.headdim)
            start = 0
            for size in sizes:
                place = np.arange(heads)[:, None] * branch.headdim + np.arange(start, start + size)
                top[first + place.ravel()] = own[:, start : start + size].max()
                start += size
            first += heads * branch.headdim
    return np.maximum(top, 1e-12) / LEVELS


def make_static(
    model: LanguageModel,
    found: Mapping[str, Site],
    per_group: bool = True,
    clusters: Mapping[str, Clusters] | None = None,
) -> LanguageModel:
    """Put the rounding into `model`, in place. found: `statistics.gather` of it; clusters: by the block's number, as `sort` records."""
    for name, module in model.projections().items():
        scale = max(float(found[f"{name}.weight"].largest.max()), 1e-12) / LEVELS
        module.register_forward_pre_hook(_input_rounder(torch.tensor(scale)))
    mixers = [(name, m) for name, m in model.named_modules() if isinstance(m, Mamba2Mixer)]
    for name, mixer in mixers:
        own = (clusters or {}).get(name.split("layers.")[-1].split(".")[0])
        scales = scanned_scales(mixer.config, found[f"{name}.scanned"].largest, per_group, own)
        mixer.conv1d.register_forward_hook(_output_rounder(torch.from_numpy(scales).float()))
    return model


def _input_rounder(scale: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, inputs: (round_static(inputs[0], scale), *inputs[1:])


def _output_rounder(scale: Tensor) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    return lambda _module, _inputs, outputs: (round_static(outputs[0], scale), outputs[1])
