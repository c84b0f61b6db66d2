"""What a transformation changes: the tensors of a model in fp64, the model, and the record of what was done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from qat.model import LanguageModel
from tmexport.checkpoint import Checkpoint
from tmexport.errors import UsageError
from tmexport.model import Model, ModelTensor

# roles of the matrices inside a block that read its norm's output, and of those whose output joins the residual stream
READERS = ("in_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("out_proj", "o_proj", "down_proj")
WRITTEN_BIASES = ("o_bias",)
INSIDE = ("x_proj", "dt_proj")  # of Mamba-1: neither


@dataclass
class Work:
    """config: the model; tensors: fp64, by Hugging Face name; done: a record for each transformation, in order."""

    config: Model
    tensors: dict[str, np.ndarray]
    done: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Work:
        """A full-precision checkpoint, read whole."""
        return cls(checkpoint.config, {name: checkpoint.dense(name).astype(np.float64) for name in checkpoint.names})

    def named(self, *roles: str, block: int | None = None) -> list[ModelTensor]:
        """The tensors of these roles, in one block or outside of the blocks."""
        return [t for t in self.config.tensors.values() if t.role in roles and t.block == block]

    def get(self, role: str, block: int | None = None) -> np.ndarray:
        """The one tensor of a role."""
        (tensor,) = self.named(role, block=block)
        return self.tensors[tensor.hf]

    def put(self, role: str, block: int | None, values: np.ndarray) -> None:
        """Replace the one tensor of a role."""
        (tensor,) = self.named(role, block=block)
        self.tensors[tensor.hf] = values

    def readers(self, block: int) -> list[ModelTensor]:
        """The matrices that read a block's norm.

        Raises:
            UsageError: the block has a matrix of a role that no table here knows.
        """
        for tensor in self.config.tensors.values():
            known = tensor.role in READERS + WRITERS + INSIDE
            if tensor.block == block and (tensor.low_bit or tensor.matrix) and not known:
                raise UsageError(f"{tensor.hf}: no transformation knows {tensor.role} matrices; leave --transform out")
        return self.named(*READERS, block=block)

    def untie(self) -> None:
        """Give the head a matrix of its own, a copy of the embedding."""
        if not self.config.tie_embeddings:
            return
        embedding = self.get("embedding")
        self.config = replace(self.config, tie_embeddings=False)
        self.put("head", None, embedding.copy())

    def record(self, name: str, **details: Any) -> None:
        """Say what was done."""
        self.done.append({"name": name, **details})

    def rounded(self) -> dict[str, np.ndarray]:
        """The tensors in fp32, in the order of the model's table.

        Raises:
            UsageError: one does not fit.
        """
        found = {}
        for name in self.config.tensors:
            with np.errstate(over="ignore"):
                found[name] = self.tensors[name].astype(np.float32)
            if not np.isfinite(found[name]).all():
                raise UsageError(f"{name}: holds NaN or infinite values after {[d['name'] for d in self.done]}")
        return found

    def model(self) -> LanguageModel:
        """The model in torch, fp32, as it is by now."""
        model = LanguageModel(self.config)
        state = {name: torch.from_numpy(values) for name, values in self.rounded().items()}
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)
