"""What the module of every kind of branch has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn


class BranchModule(nn.Module):
    """Normalised [batch, time, d_model], and a state or None, -> what the block adds: [batch, time, d_model]."""

    fresh_state: ClassVar[type[Any]]  # makes what it remembers before the first token
    # Whose output each projection reads: the name of a norm inside the branch; None: the block's. Others: of neither.
    norms_before: Mapping[str, str | None] = {}

    def mixing(self, hidden: Tensor) -> Tensor | None:
        """The matrices by which its heads mix positions, fp32 [batch, heads, time, time], of normalised [batch, time, d_model].

        None: it has none.
        """
        return None

    def operations(self, seq_len: int) -> int:
        """Multiplications and additions a token, forward, of all but its matrices."""
        raise NotImplementedError
