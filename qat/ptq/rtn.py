"""Rounding to nearest: the rule of the kind (`tmexport.types`), no data, no correction."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from qat.ptq.calibration import round_weights
from tmexport.checkpoint import Checkpoint
from tmexport.types import KINDS, Coded


def round_to_nearest(
    teacher: Checkpoint, ids: Tensor | None, kind: str, group_size: int
) -> dict[str, np.ndarray | Coded]:
    """Every projection rounded, all other tensors as they are."""
    return round_weights(teacher, kind, group_size, lambda weight: KINDS[kind].quantize(weight, group_size))
