"""What out_proj reads turned by a Hadamard matrix at every token: W x becomes (W H) (H x), H symmetric and orthonormal.

QuaRot's online Hadamard (arXiv 2404.00456), which Quamba2 (2503.22879) has before out_proj: a channel of the gated norm's output that
is larger than the others is spread over all, so that 8 bits hold them. No stock program knows it: the model becomes `tmexport-mamba2`.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from qat.ptq.transforms.hadamard import hadamard_matrix
from qat.ptq.transforms.work import Work
from tmexport.errors import UsageError
from tmexport.model.dialects import tmexport_mamba2


def online(work: Work, ids: Tensor | None, seed: int) -> None:
    """Fold the gated norms into out_proj, then turn its inputs in blocks of the largest power of two; ids and seed are not read.

    Raises:
        UsageError: the model is no pure Mamba-2, or turned already.
    """
    if work.config.family != "mamba2":
        raise UsageError(
            f"--transform online: the model is a {work.config.family}; expected a pure Mamba-2, before it is turned"
        )
    (tensor,) = work.named("out_proj", block=0)
    size = tensor.shape[1] & -tensor.shape[1]
    matrix = hadamard_matrix(size) / np.sqrt(size)
    for block in range(work.config.n_layer):
        weight = work.get("out_proj", block)
        gate = work.get("gate_norm", block)
        work.put("gate_norm", block, np.ones_like(gate))
        parts = (weight * gate.reshape(-1)).reshape(len(weight), -1, size)
        work.put("out_proj", block, (parts @ matrix).reshape(weight.shape))
    work.config = tmexport_mamba2.turned(work.config, size)
    work.record("online", size=size)
