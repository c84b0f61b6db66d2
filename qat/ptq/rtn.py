"""Rounding to nearest: the rule of the kind (`tmexport.types`), no data, no correction."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tmexport.checkpoint import Checkpoint
from tmexport.types import KINDS, Coded


def round_to_nearest(
    teacher: Checkpoint, ids: Tensor | None, kind: str, group_size: int
) -> dict[str, np.ndarray | Coded]:
    """Every projection rounded, all other tensors as they are."""
    projections = set(teacher.config.projections)
    return {
        name: KINDS[kind].quantize(teacher.dense(name), group_size) if name in projections else teacher.dense(name)
        for name in teacher.names
    }
