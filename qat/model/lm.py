"""A language model of any branches: the module that walks a `tmexport.model.Model`.

Checkpoints go in and out through `tmexport.checkpoint`; parameters have the names that the model's table gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qat.model.attention import AttentionMixer
from qat.model.branch import BranchModule
from qat.model.mamba1 import Mamba1Mixer
from qat.model.mamba2 import Mamba2Mixer
from qat.model.mlp import SwiGLUMLP
from qat.model.norm import RMSNorm
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import ConfigError
from tmexport.model import Block, Model

# kind of branch -> module(branch, eps, depth): [batch, time, d_model], state or None -> [batch, time, d_model]; it has
# `fresh_state()`, what it remembers before the first token, and `operations(seq_len)`, as in mamba2.py.
MODULES: Mapping[str, type[nn.Module]] = {
    "mamba1": Mamba1Mixer,
    "mamba2": Mamba2Mixer,
    "attention": AttentionMixer,
    "swiglu": SwiGLUMLP,
}

BlockState = tuple[Any, ...]  # one state a branch, each of a type of its module's


class ResidualBlock(nn.Module):
    """hidden + multiplier * sum of branch(norm(hidden)); the residual stream is fp32. `names`: of each branch's module."""

    def __init__(self, block: Block, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self.norm = RMSNorm(model.d_model, model.rms_eps)
        self.names = tuple(names)
        self.multiplier = block.multiplier
        for name, branch in zip(names, block.branches, strict=True):
            if branch.kind not in MODULES:
                raise ConfigError(f"a branch of kind {branch.kind!r} cannot be trained; expected {', '.join(MODULES)}")
            self.add_module(name, MODULES[branch.kind](branch, model.rms_eps, model.n_layer))

    @property
    def branches(self) -> list[BranchModule]:
        return [getattr(self, name) for name in self.names]

    def forward(self, hidden: Tensor, states: BlockState | None = None) -> Tensor:
        normal, total = self.norm(hidden), hidden
        for branch, state in zip(self.branches, states or (None,) * len(self.names), strict=True):
            out = branch(normal, state).float()
            total = total + (out if self.multiplier == 1.0 else out * self.multiplier)
        return total


class Backbone(nn.Module):
    """Token ids [batch, time] -> normalised hidden states fp32 [batch, time, d_model], over the divisor of the logits."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embeddings.weight, std=0.02)
        self.layers = nn.ModuleList(
            ResidualBlock(block, config, [config.names.branch_name(b) for b in block.branches])
            for block in config.blocks
        )
        self.norm_f = RMSNorm(config.d_model, config.rms_eps)
        self.multiplier, self.divisor = config.embedding_multiplier, config.logits_divisor
        self.checkpoint_activations = False  # keep only each block's input and recompute the rest when training

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the first block: fp32 [batch, time, d_model]."""
        hidden = self.embeddings(ids).float()
        return hidden if self.multiplier == 1.0 else hidden * self.multiplier

    @property
    def blocks(self) -> list[ResidualBlock]:
        """The layers by their own type."""
        return cast(list[ResidualBlock], list(self.layers))

    def stream(self, ids: Tensor, states: Sequence[BlockState] | None = None) -> Iterator[Tensor]:
        """The residual stream fp32 [batch, time, d_model]: what enters the first block, then what leaves each.

        `states`: one a block; read as what precedes `ids`, and updated in place.
        """
        hidden = self.embed(ids)
        yield hidden
        for index, layer in enumerate(self.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden, states[index] if states is not None else None)
            yield hidden

    def forward(self, ids: Tensor, states: Sequence[BlockState] | None = None) -> Tensor:
        """`states`: as in `stream`."""
        hidden = None
        for hidden in self.stream(ids, states):  # noqa: B007 - the last is wanted, and no other is kept
            pass
        normal = self.norm_f(hidden)
        return normal if self.divisor == 1.0 else normal / self.divisor


class LanguageModel(nn.Module):
    """A language model; also a `qat.train.teacher.Teacher`. A tied head has no parameter of its own."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, d_model]."""
        return self.backbone.embeddings.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def hidden(self, ids: Tensor, states: Sequence[BlockState] | None = None) -> Tensor:
        """What the head reads: fp32 [batch, time, d_model]; `states` as in Backbone."""
        return self.backbone(ids, states)

    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        """The residual stream before the first block and after each: fp32 [batch, time, d_model]."""
        return self.backbone.stream(ids)

    def mixing(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Of each block, what enters it, and the matrices by which its first branch mixes positions (`BranchModule.mixing`)."""
        for block, hidden in zip(self.backbone.blocks, self.stream(ids), strict=False):
            yield hidden, block.branches[0].mixing(block.norm(hidden))

    def forward(self, ids: Tensor, states: Sequence[BlockState] | None = None) -> Tensor:
        """Logits [batch, time, vocab_size] of the next token; ids int64 [batch, time]; `states` as in Backbone."""
        return F.linear(self.hidden(ids, states), self.head_weight)

    def fresh_states(self) -> list[BlockState]:
        """The states before the first token."""
        return [tuple(branch.fresh_state() for branch in layer.branches) for layer in self.backbone.blocks]

    def projections(self) -> dict[str, nn.Linear]:
        """The matrices inside the blocks that become low-bit, by the name of their module."""
        names = [name.removesuffix(".weight") for name in self.config.projections]
        return {name: cast(nn.Linear, self.get_submodule(name)) for name in names}


def load_model(folder: Path | str) -> LanguageModel:
    """The model in a checkpoint folder of any dialect, fp32; low-bit weights come back dequantised.

    Raises:
        TmexportError: from `tmexport.checkpoint`, if the folder is not a complete checkpoint.
    """
    stored = open_checkpoint(folder)
    with torch.device("meta"):
        model = LanguageModel(stored.config)
    state = {name: torch.from_numpy(np.array(stored.dense(name), np.float32)) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
