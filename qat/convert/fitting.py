"""out_proj by ridge regression on a calibration text, layer after layer, and the rank of the layers by what replacing each costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qat.convert.starting import solve
from qat.losses import distillation_loss
from qat.model import LanguageModel, ResidualBlock
from qat.model.attention import AttentionMixer
from qat.model.mamba2 import Mamba2Mixer
from tmexport.cli.progress import progress_bar

_AT_ONCE = 4  # sequences a forward pass of one block


def mixer_in(block: ResidualBlock) -> Mamba2Mixer | None:
    """The Mamba-2 mixer that is a block's only branch; None: it has another."""
    first = block.branches[0]
    return first if isinstance(first, Mamba2Mixer) and len(block.branches) == 1 else None


@torch.no_grad()
def run(block: ResidualBlock, hidden: Tensor) -> Tensor:
    """A block on hidden states [n, time, d_model], a few sequences at a time."""
    return torch.cat([block(part) for part in hidden.split(_AT_ONCE)])


@torch.no_grad()
def fit_out_proj(block: ResidualBlock, hidden: Tensor, wanted: Tensor) -> float:
    """Set out_proj of the block's mixer so that what the block adds to `hidden` is nearest to `wanted`.

    Args:
        block: whose one branch is a Mamba-2 mixer.
        hidden, wanted: [n, time, d_model].

    Returns:
        The squared error that is left, as a share of that of adding nothing.
    """
    mixer = mixer_in(block)
    assert mixer is not None
    found: list[Tensor] = []
    handle = mixer.out_proj.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0]))
    inner, width = mixer.config.d_inner, hidden.shape[-1]
    moments = torch.zeros(inner, inner, dtype=torch.float64, device=hidden.device)
    products = torch.zeros(inner, width, dtype=torch.float64, device=hidden.device)
    total = 0.0
    try:
        for part, target in zip(hidden.split(_AT_ONCE), wanted.split(_AT_ONCE), strict=True):
            block(part)
            features, y = found.pop().flatten(0, -2).float(), target.flatten(0, -2).float() / block.multiplier
            with torch.autocast(hidden.device.type, enabled=False):  # in bf16 the moments would be ruin
                moments += (features.T @ features).double()
                products += (features.T @ y).double()
            total += y.double().square().sum().item()
    finally:
        handle.remove()
    weight = solve(moments, products)
    mixer.out_proj.weight.copy_(weight.T)
    left = total - 2 * (weight * products).sum().item() + (weight * (moments @ weight)).sum().item()
    return left / max(total, 1e-12)


@torch.no_grad()
def fit_layers(teacher: LanguageModel, hybrid: LanguageModel, ids: Tensor) -> dict[int, float]:
    """Fit out_proj of every Mamba-2 mixer of `hybrid` in place, in order, on the hybrid's own hidden states.

    A layer is to add what brings the hybrid's residual stream back to the teacher's, so that it mends what the layers before it
    spoilt as far as it can see that.

    Args:
        teacher: with as many blocks.
        hybrid: started from it.
        ids: calibration tokens int64 [n, time].

    Returns:
        By block: the error that is left of what is to be added, as in `fit_out_proj`.
    """
    errors = {}
    hidden = torch.cat([teacher.backbone.embed(part) for part in ids.split(_AT_ONCE)])
    found = hidden.clone()
    pairs = list(zip(teacher.backbone.blocks, hybrid.backbone.blocks, strict=True))
    with progress_bar("fitting", len(pairs), unit="blocks") as bar:
        for number, (block, own) in enumerate(pairs):
            hidden = run(block, hidden)
            if mixer_in(own) is not None:
                errors[number] = fit_out_proj(own, found, hidden - found)
            found = run(own, found)
            bar.advance(1)
    return errors


@torch.no_grad()
def rank_layers(teacher: LanguageModel, hybrid: LanguageModel, ids: Tensor, judged: int) -> dict[int, float]:
    """What replacing each layer's attention alone costs: KL(teacher || teacher with that mixer), nats a token, by layer.

    Args:
        teacher: a Transformer.
        hybrid: started from it, every layer replaced; its out_proj are fitted on the teacher's hidden states, in place.
        ids: calibration tokens int64 [n, time].
        judged: of these sequences, how many of the last the KL is measured on.
    """
    hidden = torch.cat([teacher.backbone.embed(part) for part in ids.split(_AT_ONCE)])
    pairs = list(zip(teacher.backbone.blocks, hybrid.backbone.blocks, strict=True))
    replaced: dict[int, Tensor] = {}
    with progress_bar("ranking", len(pairs), unit="blocks") as bar:
        for number, (block, own) in enumerate(pairs):
            after = run(block, hidden)
            replaced = {layer: run(block, found) for layer, found in replaced.items()}
            if mixer_in(own) is not None:
                fit_out_proj(own, hidden, after - hidden)
                replaced[number // 2] = run(own, hidden[-judged:])
            hidden = after
            bar.advance(1)
    last = hidden[-judged:]
    return {layer: _divergence(teacher, last, found, ids[-judged:]) for layer, found in replaced.items()}


def _divergence(teacher: LanguageModel, wanted: Tensor, found: Tensor, ids: Tensor) -> float:
    final, head, divisor = teacher.backbone.norm_f, teacher.head_weight, teacher.backbone.divisor
    wanted, found = final(wanted) / divisor, final(found) / divisor
    return distillation_loss(found, head, ids, wanted, head, 1.0).kl.item()


def inputs_of(teacher: LanguageModel, ids: Tensor) -> Iterator[tuple[int, AttentionMixer, Tensor]]:
    """(layer, its attention, the normalised hidden states [n, time, d_model] that it reads) of a Transformer."""
    hidden = torch.cat([teacher.backbone.embed(part) for part in ids.split(_AT_ONCE)])
    for number, block in enumerate(teacher.backbone.blocks):
        first = block.branches[0]
        if isinstance(first, AttentionMixer):
            yield number // 2, first, block.norm(hidden)
        hidden = run(block, hidden)


def highest(cost: dict[int, float], count: int) -> Sequence[int]:
    """The `count` layers of the highest cost, in their order."""
    return sorted(sorted(cost, key=lambda layer: -cost[layer])[:count])
