"""From a Transformer's folder or GGUF to a hybrid's checkpoint, without a gradient."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from qat.convert.fitting import fit_layers, highest, inputs_of, mixer_in, rank_layers
from qat.convert.shape import Cost, cost_of, hybrid_of, kept_layers
from qat.convert.starting import start_mixer
from qat.model import LanguageModel, load_model
from qat.quantizer import model_tensors
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError, UsageError

_JUDGED = 8  # sequences that the layers are ranked on


@dataclass(frozen=True)
class Converted:
    """cost: what the hybrid is. ranks: with --keep auto, what replacing each layer alone costs, KL in nats a token. errors: of
    each replaced layer, by its number, the share of what it was to add that is left after the fit.
    """

    cost: Cost
    ranks: dict[int, float]
    errors: dict[int, float]

    @property
    def error(self) -> float:
        return mean(self.errors.values())


def convert(teacher: Path, keep: str, out: Path, ids: Tensor) -> Converted:
    """Write to `out` the hybrid of the Transformer in the folder `teacher`.

    Args:
        teacher: a full-precision checkpoint folder of the family llama.
        keep: which layers keep their attention (`qat.convert.shape.kept_layers`).
        out: folder to write, another.
        ids: calibration tokens int64 [n, time].

    Raises:
        TmexportError: the model cannot be converted, or is low-bit; or `out` cannot be written.
    """
    if out.resolve() == teacher.resolve():
        raise UsageError(f"{out}: is the Transformer's folder, which would be overwritten; choose another --out")
    checkpoint = open_checkpoint(teacher)
    if checkpoint.coded:
        raise CheckpointError(f"{teacher}: holds low-bit weights; expected a full-precision Transformer")
    hybrid_of(checkpoint.config, ())  # whether it can be, before the weights are read
    kept = kept_layers(keep, len(checkpoint.config.blocks) // 2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, ids = load_model(teacher).requires_grad_(False).to(device), ids.to(device)
    ranks: dict[int, float] = {}
    if isinstance(kept, int):
        hybrid = started(model, (), ids)
        ranks = rank_layers(model, hybrid, ids, min(_JUDGED, len(ids)))
        kept = tuple(highest(ranks, kept))
        hybrid = restored(model, hybrid, kept)
    else:
        hybrid = started(model, kept, ids)
    errors = fit_layers(model, hybrid, ids)
    write_checkpoint(out, hybrid.config, model_tensors(hybrid), checkpoint.tokenizer)
    cost = cost_of(model.config, hybrid.config, kept)
    return Converted(cost, ranks, {block // 2: error for block, error in errors.items()})


@torch.no_grad()
def started(teacher: LanguageModel, kept: Collection[int], ids: Tensor) -> LanguageModel:
    """The hybrid with the teacher's weights, and in the layers not kept mixers started from them, on the teacher's inputs."""
    hybrid = untrained(teacher, kept)
    blocks = hybrid.backbone.blocks
    for layer, attention, inputs in inputs_of(teacher, ids):
        mixer = mixer_in(blocks[2 * layer])
        if mixer is not None:
            start_mixer(mixer, attention, inputs)
    return hybrid


def untrained(teacher: LanguageModel, kept: Collection[int]) -> LanguageModel:
    """The hybrid with the teacher's weights, and in the layers not kept random mixers."""
    hybrid = LanguageModel(hybrid_of(teacher.config, kept)).requires_grad_(False).to(teacher.head_weight.device)
    known, own = teacher.state_dict(), hybrid.state_dict()
    hybrid.load_state_dict({name: known.get(name, tensor) for name, tensor in own.items()})
    return hybrid


def restored(teacher: LanguageModel, hybrid: LanguageModel, kept: Collection[int]) -> LanguageModel:
    """A hybrid with every layer replaced -> one in which those of `kept` have the teacher's attention again."""
    fewer = LanguageModel(hybrid_of(teacher.config, kept)).requires_grad_(False).to(teacher.head_weight.device)
    known = {**teacher.state_dict(), **hybrid.state_dict()}
    fewer.load_state_dict({name: known[name] for name in fewer.state_dict()})
    return fewer
