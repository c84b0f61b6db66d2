"""GPTQ: rounds a column, and corrects the columns to come for its error, as the inputs' second moments say it should be.

Frantar et al. 2022, arXiv 2210.17323. Layers in order, each on what the rounded layers before it produce. The scales are those
that the checkpoint stores: by the rule of the kind from the group as corrected by then, in fp16, before a column of it is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qat.ptq.calibration import round_each
from qat.quantizer import group_scales, round_to_codes
from tmexport.checkpoint import Checkpoint
from tmexport.types import KINDS, Coded

_DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ's code


def gptq(teacher: Checkpoint, ids: Tensor, kind: str, groups: Mapping[str, int]) -> dict[str, np.ndarray | Coded]:
    """The projections in `groups` rounded with error feedback; all other tensors as they are."""
    return round_each(
        teacher, ids, kind, groups, lambda p: gptq_weight(p.module.weight, p.inputs.moments, kind, groups[p.name])
    )


def gptq_weight(weight: Tensor, moments: Tensor, kind: str, group_size: int) -> Coded:
    """One weight fp32 [n, k], rounded with feedback; moments: fp64 [k, k], the sum of x x^T over the inputs x."""
    size = weight.shape[1]
    damping = _DAMPING * moments.diagonal().mean().clamp_min(1e-12)
    inverse = torch.linalg.inv(moments + damping * torch.eye(size, dtype=moments.dtype))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, codes, scales = weight.double().clone(), torch.empty_like(weight, dtype=torch.int8), []
    for column in range(size):
        if column % group_size == 0:  # the group's scale, from its weights as corrected so far
            scales.append(group_scales(work[:, column : column + group_size].float(), group_size, kind))
        scale, value = scales[-1].double(), work[:, column : column + 1].clone()
        rounded = round_to_codes(kind, value, scale)
        codes[:, column : column + 1] = rounded.to(torch.int8)
        error = (value - rounded * scale) / upper[column, column]
        work[:, column + 1 :] -= error * upper[column, column + 1 :]
    return KINDS[kind].tensor(codes.numpy(), torch.cat(scales, 1).numpy(), group_size)
