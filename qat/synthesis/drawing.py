"""Text that a model writes itself: many answers at once, drawn from its own distribution. What a student is distilled on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qat.model import LanguageModel
from qat.model.lm import BlockState

_LOOK_EVERY = 32  # tokens; the answers that are complete then leave the batch


@torch.no_grad()
def continue_prompts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    most: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Each prompt and what the model says after it, up to and with an end token.

    All are read and written together, a token a step: a prompt that is longer than others is still being read while those are
    answered, so that nothing is padded.

    Args:
        model: on the device where it computes, in the caller's autocast.
        prompts: token ids, at least one each.
        ends: tokens that end an answer.
        most: of prompt and answer together, tokens.
        temperature: of the draw; 0 takes the likeliest token.
        seed: of the draw.
    """
    device = model.head_weight.device
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), max(most, int(lengths.max())), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt))
    ids, stops = ids.to(device), torch.full((len(prompts),), most, device=device)
    end_ids, rows = torch.tensor(sorted(ends), device=device), torch.arange(len(prompts), device=device)
    states = model.fresh_states()
    for place in range(most - 1):
        hidden = model.hidden(ids[rows, place, None], states)[:, -1]
        drawn = _draw((hidden @ model.head_weight.T).float(), temperature, generator)
        answering = (place + 1 >= lengths[rows]) & (stops[rows] == most)
        ids[rows, place + 1] = torch.where(answering, drawn, ids[rows, place + 1])
        ended = answering & torch.isin(drawn, end_ids)
        stops[rows] = torch.where(ended, place + 2, stops[rows])
        if place % _LOOK_EVERY == _LOOK_EVERY - 1:
            kept = (stops[rows] == most).nonzero()[:, 0]
            if not len(kept):
                break
            rows = rows[kept]
            _select(states, kept)
    written = ids.cpu()
    return [written[row, :stop].tolist() for row, stop in enumerate(stops.tolist())]


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def _select(states: list[BlockState], rows: Tensor) -> None:
    """Keep these sequences of a batch, in place."""
    for state in (state for block in states for state in block if state is not None):
        for name, value in vars(state).items():
            if value is not None:
                setattr(state, name, value[rows])
