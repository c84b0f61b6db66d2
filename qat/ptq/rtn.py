"""Rounding to nearest: the rule of the kind (`tmexport.types`), no data, no correction."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from qat.ptq.calibration import round_weights
from tmexport.checkpoint import Checkpoint
from tmexport.types import KINDS, Coded


def round_to_nearest(
    teacher: Checkpoint, ids: Tensor | None, kind: str, groups: Mapping[str, int]
) -> dict[str, np.ndarray | Coded]:
    """The projections in `groups` rounded, all other tensors as they are."""
    return round_weights(teacher, kind, groups, KINDS[kind].quantize)
