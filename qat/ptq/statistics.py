"""What a model's activations look like on a calibration text: one pass, no weight changed.

    found = gather(model, ids)
    found["backbone.layers.0.mixer.in_proj.weight"].moments

A site is the input of a projection (by the projection's name) or what a Mamba-2 mixer's scan reads, x, B and C side by side
(`scanned_name` of its in_proj). `save` writes a file that says which text it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.model import LanguageModel
from qat.model.mamba2 import Mamba2Mixer
from tmexport.cli.progress import progress_bar
from tmexport.files import atomic_write

PERCENTILES = (99.0, 99.9, 99.99)
_AT_ONCE = 4  # sequences a forward pass
_OCTAVES, _A_OCTAVE = (-24, 16), 64  # the histogram of |x|: from 2^-24 to 2^16, 64 bins an octave


class Site:
    """One place. Of its channels: largest, the maximum of |x|; mean, the mean of |x|; moments, the sum of x x^T or None. fp64."""

    def __init__(self, channels: int, moments: bool) -> None:
        self.largest, self._sum = np.zeros(channels), np.zeros(channels)
        self.moments: np.ndarray | None = np.zeros((channels, channels)) if moments else None
        self.count = 0
        self._bins = np.zeros((_OCTAVES[1] - _OCTAVES[0]) * _A_OCTAVE + 1, np.int64)

    def add(self, x: Tensor) -> None:
        """x: [..., channels]."""
        wide = x.detach().flatten(0, -2).double()
        size = wide.abs()
        self.largest = np.maximum(self.largest, size.amax(0).numpy())
        self._sum += size.sum(0).numpy()
        self.count += len(wide)
        if self.moments is not None:
            self.moments += (wide.T @ wide).numpy()
        place = ((size.clamp_min(2.0 ** _OCTAVES[0]).log2() - _OCTAVES[0]) * _A_OCTAVE).long()
        self._bins += torch.bincount(place.clamp_max(len(self._bins) - 1).flatten(), minlength=len(self._bins)).numpy()

    @property
    def mean(self) -> np.ndarray:
        return self._sum / max(1, self.count)

    def percentile(self, percent: float) -> float:
        """Of |x| over all channels: the upper edge of its bin, at most 1.1 % too large."""
        below = np.cumsum(self._bins)
        place = int(np.searchsorted(below, percent / 100 * below[-1]))
        return min(float(2.0 ** ((place + 1) / _A_OCTAVE + _OCTAVES[0])), float(self.largest.max(initial=0)))


def scanned_name(in_proj: str) -> str:
    """The site of what the scan of a mixer reads, by its in_proj's name."""
    return in_proj.replace("in_proj.weight", "scanned")


@torch.no_grad()
def gather(model: LanguageModel, ids: Tensor, moments: bool = True) -> dict[str, Site]:
    """The statistics of every site on tokens ids int64 [n, seq_len]; moments: also second moments of projections' inputs."""
    found: dict[str, Site] = {}
    handles = []
    for name, module in model.projections().items():
        site = found[f"{name}.weight"] = Site(module.in_features, moments)
        handles.append(module.register_forward_pre_hook(_of_input(site)))
    for name, module in model.named_modules():
        if isinstance(module, Mamba2Mixer):
            site = found[f"{name}.scanned"] = Site(module.config.conv_dim, False)
            handles.append(module.conv1d.register_forward_hook(_of_convolution(site)))
    try:
        with progress_bar("calibrating", len(ids), unit="sequences") as bar:
            for part in ids.split(_AT_ONCE):
                model.hidden(part)
                bar.advance(len(part))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _of_input(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, inputs: site.add(inputs[0])


def _of_convolution(site: Site) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor]], None]:
    return lambda _module, _inputs, outputs: site.add(outputs[0])


def text_digest(ids: Tensor) -> str:
    """SHA-256 of the calibration tokens as little-endian int64: which text it was, and which of it."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def save(found: Mapping[str, Site], ids: Tensor, path: Path) -> None:
    """A JSON file: the digest and the number of tokens; of each site the percentiles, and of its channels maximum and mean.

    Second moments, which are as large as the model, are not in it.
    """
    sites = {
        name: {
            "percentiles": {str(p): site.percentile(p) for p in PERCENTILES},
            "largest": site.largest.tolist(),
            "mean": site.mean.tolist(),
        }
        for name, site in found.items()
    }
    text = {"digest": text_digest(ids), "sequences": len(ids), "tokens": ids.numel()}
    with atomic_write(path) as file:
        file.write(json.dumps({"text": text, "sites": sites}).encode())
