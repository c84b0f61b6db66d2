"""Norms' weights into the matrices that read them: W diag(w) with a norm of ones is W with a norm of w.

A norm of the blocks, and a Mamba-2 mixer's gated norm, become ones. The last norm goes into the head, which takes a tied head
from the embedding: only if the norm is not constant, because a constant one commutes with every rotation where it is.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from qat.ptq.transforms.work import Work


def fold(work: Work, ids: Tensor | None, seed: int) -> None:
    """Fold every norm; ids and seed are not read."""
    for block in range(len(work.config.blocks)):
        weight = work.get("norm", block)
        for tensor in work.readers(block):
            work.tensors[tensor.hf] = work.tensors[tensor.hf] * weight
        work.put("norm", block, np.ones_like(weight))
        for tensor in work.named("gate_norm", block=block):
            weight = work.tensors[tensor.hf]
            work.put("out_proj", block, work.get("out_proj", block) * weight.reshape(-1))
            work.tensors[tensor.hf] = np.ones_like(weight)
    last = work.get("final_norm")
    untied = not (last == last[0]).all()
    if untied:
        work.untie()
        work.put("head", None, work.get("head") * last)
        work.put("final_norm", None, np.ones_like(last))
    work.record("fold", head="own" if not work.config.tie_embeddings else "tied")


def is_folded(work: Work) -> bool:
    """Whether every norm that reads the residual stream is constant."""
    norms = [work.get("norm", block) for block in range(len(work.config.blocks))] + [work.get("final_norm")]
    return all((norm == norm[0]).all() for norm in norms)
