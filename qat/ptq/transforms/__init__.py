"""Changes of a model's weights that leave its function as it is, and make it easier to round. A file each.

work.py       what a transformation changes: the tensors in fp64 and the model they belong to
fold.py       norms' weights into the matrices that read them
rotate.py     the residual stream turned by an orthogonal matrix; hadamard.py, of which sizes there are Hadamard matrices
sort.py       heads and channels of a Mamba-2 mixer sorted by how large they are
online.py     what out_proj reads turned by a Hadamard matrix at run time
smooth.py     channels between a norm and a matrix scaled, so that neither holds all of the outliers

They compose: `--transform hadamard --transform sort` are applied in this order, and stand in the checkpoint's provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qat.ptq.transforms.fold import fold
from qat.ptq.transforms.online import online
from qat.ptq.transforms.rotate import hadamard, klt
from qat.ptq.transforms.smooth import smooth
from qat.ptq.transforms.sort import sort
from qat.ptq.transforms.work import Work
from tmexport.cli.progress import progress_bar


@dataclass(frozen=True)
class Transform:
    """apply(work, ids, seed) changes the work; reads_text: whether it needs calibration tokens ids."""

    help: str
    apply: Callable[[Work, Tensor | None, int], None]
    reads_text: bool = False


TRANSFORMS = {
    "fold": Transform("norms into the matrices that read them", fold),
    "hadamard": Transform("fold, then turn the residual stream by a Hadamard matrix with random signs", hadamard),
    "klt": Transform("fold, then turn it by its principal axes times a Hadamard matrix (MambaQuant)", klt, True),
    "sort": Transform("sort heads and channels by size (Quamba2)", sort, True),
    "smooth": Transform("share outliers between activations and weights (SmoothQuant, MambaQuant)", smooth, True),
    "online": Transform(
        "turn what out_proj reads by a Hadamard matrix at run time; stock programs refuse the file", online
    ),
}


def apply(work: Work, names: Sequence[str], ids: Tensor | None, seed: int) -> None:
    """Apply transformations, keys of TRANSFORMS, in this order."""
    with progress_bar("transforming", len(names), unit="steps") as bar:
        for name in names:
            TRANSFORMS[name].apply(work, ids, seed)
            bar.advance(1)


__all__ = ["TRANSFORMS", "Transform", "Work", "apply"]
