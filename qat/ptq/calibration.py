"""What enters the projections on a calibration text, and the tensors of a model once they are rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qat.model import LanguageModel, ResidualBlock, load_model
from tmexport.checkpoint import Checkpoint, kept
from tmexport.cli.progress import progress_bar
from tmexport.types import Coded

_AT_ONCE = 4  # sequences a forward pass of one block


@dataclass
class Inputs:
    """The inputs x of a projection over all positions: moments fp64 [k, k], the sum of x x^T; magnitude, the mean of |x|."""

    moments: Tensor
    magnitude: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """x: [..., k]."""
        wide = x.flatten(0, -2).double()
        self.moments += wide.T @ wide
        self.magnitude += (wide.abs().sum(0) - self.magnitude * len(wide)) / (self.count + len(wide))
        self.count += len(wide)


@dataclass(frozen=True)
class Projection:
    """A projection of a model: its Hugging Face name, its module, the block it is in, and what enters it."""

    name: str
    module: nn.Linear
    block: ResidualBlock
    inputs: Inputs


@torch.no_grad()
def walk(model: LanguageModel, ids: Tensor, chosen: Iterable[str] | None = None) -> Iterator[Projection]:
    """The chosen projections (Hugging Face names; None: all) in the order of the model. What enters it is what those before it, as they are by then, produce.

    ids: int64 [n, seq_len]. Each block runs once for each of its projections and once for the next block.
    """
    hidden = torch.cat([model.backbone.embed(part) for part in ids.split(_AT_ONCE)])
    wanted = set(model.config.projections if chosen is None else chosen)
    modules = {name: module for name, module in model.projections().items() if f"{name}.weight" in wanted}
    with progress_bar("calibrating", len(modules), unit="matrices") as bar:
        for number, block in enumerate(model.backbone.blocks):
            inside = [name for name in modules if name.startswith(f"backbone.layers.{number}.")]
            for name in inside:
                yield Projection(f"{name}.weight", modules[name], block, _inputs(block, modules[name], hidden))
                bar.advance(1)
            hidden = torch.cat([block(part) for part in hidden.split(_AT_ONCE)])


def _inputs(block: nn.Module, module: nn.Linear, hidden: Tensor) -> Inputs:
    size = module.in_features
    found = Inputs(torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))
    handle = module.register_forward_pre_hook(lambda _module, inputs: found.add(inputs[0]))
    try:
        for part in hidden.split(_AT_ONCE):
            block(part)
    finally:
        handle.remove()
    return found


def round_weights(
    teacher: Checkpoint, kind: str, groups: Mapping[str, int], method: Callable[[np.ndarray, int], Coded]
) -> dict[str, np.ndarray | Coded]:
    """The projections in `groups`, which has their group sizes, by a method that sees a weight alone, or as they are if they are
    of the kind already; all other tensors as they are.
    """
    return {
        name: (kept(teacher, name, kind, groups[name]) or method(teacher.dense(name), groups[name]))
        if name in groups
        else teacher.dense(name)
        for name in teacher.names
    }


def round_each(
    teacher: Checkpoint, ids: Tensor, kind: str, groups: Mapping[str, int], method: Callable[[Projection], Coded]
) -> dict[str, np.ndarray | Coded]:
    """The same with a method that sees what enters, too: layers in order, each on what the rounded layers before it produce."""
    model = load_model(teacher.path).requires_grad_(False)
    codes: dict[str, np.ndarray | Coded] = {}
    for projection in walk(model, ids, groups):
        coded = kept(teacher, projection.name, kind, groups[projection.name]) or method(projection)
        codes[projection.name] = coded
        projection.module.weight.data.copy_(torch.from_numpy(coded.dense()))
    state = model.state_dict()
    return {name: codes[name] if name in codes else state[name].numpy() for name in model.config.tensors}
