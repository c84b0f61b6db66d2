"""A factor for every channel between a norm and the matrices that read it: out of the norm's weight, into the matrices.

factor = max|x|^power / max|w|^(1 - power), as in SmoothQuant (Xiao et al. 2022, arXiv 2211.10438), power 1/2: MambaQuant's
smooth-fused scale (arXiv 2501.13484) of the matrices after a norm. Its gate with a slope a channel, for Mamba-1's out_proj,
has no place in a stock file and is left out. A rotated residual stream needs constant norms: what reads it is left alone then,
and so is an out_proj whose inputs are turned.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from qat.ptq.statistics import gather
from qat.ptq.transforms.work import Work
from tmexport.model.dialects import tmexport_mamba2

_POWER = 0.5


def smooth(work: Work, ids: Tensor | None, seed: int) -> None:
    """Scale the inputs of the blocks' matrices that a norm gives; seed is not read."""
    assert ids is not None
    found = gather(work.model(), ids)
    rotated = any(step["name"] in ("hadamard", "klt") for step in work.done)
    scaled = 0
    for block in range(len(work.config.blocks)):
        pairs = [] if rotated else [("norm", work.readers(block))]
        if work.named("gate_norm", block=block) and work.config.family != tmexport_mamba2.NAME:
            pairs.append(("gate_norm", work.named("out_proj", block=block)))
        for norm, readers in pairs:
            weights = [work.tensors[tensor.hf] for tensor in readers]
            factor = _factor(found[readers[0].hf].largest, np.max([np.abs(w).max(0) for w in weights], axis=0))
            for tensor, weight in zip(readers, weights, strict=True):
                work.tensors[tensor.hf] = weight * factor
            before = work.get(norm, block)
            work.put(norm, block, before / factor.reshape(before.shape))
            scaled += len(readers)
    work.record("smooth", power=_POWER, matrices=scaled)


def _factor(largest: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """With a geometric mean of 1, so that a norm's weights stay where they were."""
    factor = np.maximum(largest, 1e-6) ** _POWER / np.maximum(weight, 1e-6) ** (1 - _POWER)
    return factor / np.exp(np.log(factor).mean())
