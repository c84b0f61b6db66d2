"""What a teacher must be able to do. `qat.model.LanguageModel` does; so may a model of any other kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Teacher(Protocol):
    """A language model that is imitated. Its blocks must be as many, and its stream as wide, as those that are aligned to it."""

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, width], on the device where it computes."""

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head reads: int64 [batch, time] -> [batch, time, width]."""

    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        """The residual stream [batch, time, width]: what enters the first block, then what leaves each."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its tensors, by which it is told from another."""

    def to(self, device: torch.device) -> Any:
        """Move it, in place."""
