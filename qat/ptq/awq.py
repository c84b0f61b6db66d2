"""AWQ: scales input channels by a power of their mean activation before rounding, and back in the norm before them.

Lin et al. 2023, arXiv 2306.00978. In reals the folded model is the teacher; the power that leaves the smallest error of the
output is searched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from qat.ptq.calibration import Projection, round_each
from tmexport.checkpoint import Checkpoint
from tmexport.errors import UsageError
from tmexport.types import KINDS, Coded

_POWERS = [tenth / 10 for tenth in range(11)]


def awq(teacher: Checkpoint, ids: Tensor, kind: str, groups: Mapping[str, int]) -> dict[str, np.ndarray | Coded]:
    """The projections in `groups` scaled and rounded, the norms before them scaled back."""

    def method(projection: Projection) -> Coded:
        group_size = groups[projection.name]
        fold(projection, best_factor(projection, kind, group_size))
        return KINDS[kind].quantize(projection.module.weight.numpy(), group_size)

    return round_each(teacher, ids, kind, groups, method)


@torch.no_grad()
def best_factor(projection: Projection, kind: str, group_size: int) -> Tensor:
    """A factor for every input channel, fp32 [k]: that of least error of the output among the powers."""
    weight, inputs = projection.module.weight, projection.inputs
    magnitude = inputs.magnitude.clamp_min(1e-6)
    found: list[tuple[float, Tensor]] = []
    for power in _POWERS:
        factor = magnitude**power
        factor = (factor / (factor.max() * factor.min()).sqrt()).float()
        rounded = torch.from_numpy(KINDS[kind].quantize((weight * factor).numpy(), group_size).dense())
        error = (rounded / factor - weight).double()
        found.append(((error @ inputs.moments * error).sum().item(), factor))
    return min(found, key=lambda pair: pair[0])[1]


def fold(projection: Projection, factor: Tensor) -> None:
    """Multiply the projection's input channels, and divide the norm's that they come from."""
    projection.module.weight.data.mul_(factor)
    _norm_before(projection).data.div_(factor)


def _norm_before(projection: Projection) -> nn.Parameter:
    """The weight of the norm whose output is what enters the projection, and nothing else."""
    block = projection.block
    for branch in block.branches:
        for own, norm in branch.norms_before.items():
            if getattr(branch, own) is projection.module:
                if norm is not None:
                    return getattr(branch, norm).weight
                if len(block.branches) == 1 and list(branch.norms_before.values()).count(None) == 1:
                    return block.norm.weight
    raise UsageError(f"AWQ needs a norm before {projection.name} that nothing else reads; use another method")
