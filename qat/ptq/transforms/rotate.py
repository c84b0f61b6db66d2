"""The residual stream turned by an orthogonal matrix R: x becomes x R everywhere, which no constant norm sees.

A row of the embedding e becomes e R, a matrix W that reads the stream W R, one that writes it R^T W, and the head as the
embedding: a head tied to it stays so. QuaRot (arXiv 2404.00456), SpinQuant (2405.16406); R = K H with the axes K of the
inputs' covariance is MambaQuant's (2501.13484): every channel then has the same variance, the mean of the eigenvalues.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from qat.ptq.statistics import gather
from qat.ptq.transforms.fold import fold, is_folded
from qat.ptq.transforms.hadamard import orthogonal
from qat.ptq.transforms.work import READERS, WRITERS, WRITTEN_BIASES, Work


def hadamard(work: Work, ids: Tensor | None, seed: int) -> None:
    """Fold the norms where they are not constant, then turn by a Hadamard matrix; ids is not read.

    Raises:
        UsageError: there is no Hadamard matrix of d_model.
    """
    turn = orthogonal(work.config.d_model, np.random.default_rng(seed))
    if not is_folded(work):
        fold(work, ids, seed)
    _rotate(work, turn)
    work.record("hadamard", size=work.config.d_model, seed=seed)


def klt(work: Work, ids: Tensor | None, seed: int) -> None:
    """The same by K H: K of the second moments of what the blocks' norms give, summed over the blocks.

    Raises: as hadamard.
    """
    turn = orthogonal(work.config.d_model, np.random.default_rng(seed))
    if not is_folded(work):
        fold(work, ids, seed)
    assert ids is not None
    found = gather(work.model(), ids)
    readers = [work.readers(block)[0].hf for block in range(len(work.config.blocks))]
    moments = [own for name in readers if (own := found[name].moments) is not None]
    _, axes = np.linalg.eigh(np.sum(moments, axis=0))
    _rotate(work, axes @ turn)
    work.record("klt", size=work.config.d_model, seed=seed)


def _rotate(work: Work, turn: np.ndarray) -> None:
    for name, tensor in work.config.tensors.items():
        if tensor.role in ("embedding", "head", *READERS):
            work.tensors[name] = work.tensors[name] @ turn
        elif tensor.role in WRITERS or tensor.role in WRITTEN_BIASES:
            work.tensors[name] = turn.T @ work.tensors[name]
