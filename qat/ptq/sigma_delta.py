"""Sigma-delta: carries a weight's rounding error to the next weight of its row, so that errors of neighbours cancel."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qat.ptq.calibration import round_weights
from qat.quantizer import group_scales, round_to_codes
from tmexport.checkpoint import Checkpoint
from tmexport.types import KINDS, Coded


def sigma_delta(
    teacher: Checkpoint, ids: Tensor | None, kind: str, groups: Mapping[str, int]
) -> dict[str, np.ndarray | Coded]:
    """First-order noise shaping along the inputs of every row of the projections in `groups`; no data."""
    return round_weights(
        teacher, kind, groups, lambda weight, size: shaped(torch.from_numpy(np.array(weight)), kind, size)
    )


def shaped(weight: Tensor, kind: str, group_size: int) -> Coded:
    """One weight fp32 [n, k]."""
    scales = group_scales(weight, group_size, kind)
    codes, error = torch.empty_like(weight, dtype=torch.int8), torch.zeros_like(weight[:, 0])
    for column in range(weight.shape[1]):
        scale = scales[:, column // group_size].float()
        wanted = weight[:, column] + error
        rounded = round_to_codes(kind, wanted, scale)
        codes[:, column] = rounded.to(torch.int8)
        error = wanted - rounded * scale
    return KINDS[kind].tensor(codes.numpy(), scales.numpy(), group_size)
