"""Other ways to round a recurrent state, simulated in torch: by a counter hash, along Hadamard axes, in 4 bits.

    python scripts/studies/state_rounding.py --teacher scripts/demo/teacher --held-out heldout.jsonl

The rules beside `compact`'s (`qat.model.states`): "stochastic" rounds up with the probability of the fraction, by a hash of
position, layer and element; "Hadamard" turns B and C along the state, so that y stays what it is and a row's values are alike; "int4"
has a scale, max|h| / 7, every 32 elements of a row. Every one rounds at every token. Measured: bits a token of several texts
read side by side, and of a passage of 32 tokens that comes again. A table goes to stderr; the last line is one JSON object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from qat.evaluate import documents_in, find_tokenizer
from qat.model import LanguageModel, load_model
from qat.model.mamba2 import Mamba2Mixer
from qat.model.states import Rows, advance_fp32, advance_int8, mamba2_scan
from qat.ptq.transforms.hadamard import hadamard_matrix
from tmexport.cli.app import run_command
from tmexport.cli.progress import Bar, progress_bar

PASSAGE, DISTANCES, BLOCK, PIECE = 32, (64, 512), 32, 256
Round = Callable[[Tensor, int], Tensor]


def nearest(h: Tensor, counter: int) -> Tensor:
    """To the nearest whole number, halves to even."""
    return h.round()


def stochastic(h: Tensor, counter: int) -> Tensor:
    """Up with the probability of the fraction; the draw is a hash (MurmurHash3's last step) of the counter and the element's number."""
    x = torch.arange(h.numel()) + counter * h.numel()
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    draw = (x ^ (x >> 16)).to(torch.float32).reshape(h.shape) * 2.0**-32
    return (h + draw).floor()


class Way(NamedTuple):
    """bits: 32, 8 (a scale a row) or 4 (a scale a block); hadamard: along the state."""

    bits: int
    round: Round = nearest
    hadamard: bool = False


WAYS = {
    "fp32": Way(32),
    "int8": Way(8),
    "int8, stochastic": Way(8, stochastic),
    "int8, Hadamard": Way(8, hadamard=True),
    "int4": Way(4),
    "int4, stochastic": Way(4, stochastic),
    "int4, Hadamard": Way(4, hadamard=True),
}


def advance(way: Way, layer: int, layers: int) -> Callable[..., Tensor]:
    """One token of one layer, as those of `qat.model.states.ADVANCE`."""

    def run(rows: Rows, decay: Tensor, slowest: Tensor, step: Tensor, b: Tensor) -> Tensor:
        counter = rows.position * layers + layer
        if way.bits == 32:
            return advance_fp32(rows, decay, slowest, step, b)
        if way.bits == 8:
            h = advance_int8(rows, decay, slowest, step, b)
            rows.codes = way.round(h, counter).clamp(-127, 127)
            return h
        h = rows.codes * decay + step[..., None] * b
        blocks = h.unflatten(-1, (-1, BLOCK))
        scale = (blocks.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-30)
        rows.codes = (way.round(blocks / scale, counter).clamp(-7, 7) * scale).flatten(-2)
        return h

    return run


def keep(model: LanguageModel, way: Way) -> None:
    """Let the model's Mamba-2 mixers keep their states this way."""
    mixers = [module for module in model.modules() if isinstance(module, Mamba2Mixer)]
    for layer, mixer in enumerate(mixers):
        scan = mamba2_scan(advance(way, layer, len(mixers)), "int8" if way.bits == 8 else "fp32")
        n = mixer.config.d_state
        turn = torch.from_numpy(hadamard_matrix(n) / math.sqrt(n)).float()
        mixer.scan = partial(_turned, scan, turn) if way.hadamard else scan


def _turned(
    scan: Callable[..., Any], turn: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Any
) -> Any:
    return scan(x, dt, a, b @ turn, c @ turn, *rest)


@torch.no_grad()
def bits(model: LanguageModel, ids: np.ndarray, first: int, bar: Bar) -> tuple[float, float]:
    """Of ids [texts, tokens] from number `first` on: mean bits a token, and the share that is the likeliest."""
    states, tokens = model.fresh_states(), torch.from_numpy(ids.astype(np.int64))
    cost, hits = [], []
    for start in range(0, ids.shape[1] - 1, PIECE):
        part = tokens[:, start : start + PIECE + 1]
        logits = model.hidden(part[:, :-1], states) @ model.head_weight.t()
        cost.append(-torch.log_softmax(logits, -1).gather(2, part[:, 1:, None])[..., 0] / math.log(2))
        hits.append(logits.argmax(-1) == part[:, 1:])
        bar.advance(part.shape[1] - 1)
    mean_cost, mean_hits = (float(torch.cat(found, 1)[:, first - 1 :].double().mean()) for found in (cost, hits))
    return mean_cost, mean_hits


def again(stream: np.ndarray, texts: int, distance: int) -> np.ndarray:
    """Rows of a passage, other text, and the passage again."""
    starts = np.arange(texts) * ((len(stream) - PASSAGE - distance) // texts)
    other = np.roll(stream, -len(stream) // 2)
    return np.stack([np.r_[stream[s : s + PASSAGE], other[s : s + distance], stream[s : s + PASSAGE]] for s in starts])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--teacher", required=True, type=click.Path(path_type=Path, exists=True), help="A full-precision Mamba-2."
)
@click.option("--held-out", required=True, type=click.Path(path_type=Path, exists=True), help="Text to score.")
@click.option("--texts", default=8, show_default=True, help="Read side by side.")
@click.option("--tokens", default=1024, show_default=True, help="Of each of them.")
def main(teacher: Path, held_out: Path, texts: int, tokens: int) -> None:
    """Measure the ways to round a state."""
    torch.set_num_threads(1)
    config = load_model(teacher).config
    stream = np.concatenate(
        [document.ids for document in documents_in([held_out], find_tokenizer(teacher, None), config)]
    )
    starts = np.arange(texts) * ((len(stream) - tokens - 1) // texts)
    wanted = {"text": (np.stack([stream[s : s + tokens + 1] for s in starts]), 1)}
    wanted |= {f"again after {d}": (again(stream, texts, d), PASSAGE + d + 2) for d in DISTANCES}
    rows: dict[str, dict[str, tuple[float, float]]] = {}
    steps = sum(ids.shape[1] - 1 for ids, _ in wanted.values())
    with progress_bar("ways", steps * len(WAYS), unit="positions", keep=True) as bar:
        for name, way in WAYS.items():
            model = load_model(teacher).requires_grad_(False)
            keep(model, way)
            rows[name] = {part: bits(model, ids, first, bar) for part, (ids, first) in wanted.items()}
            click.echo(
                "| " + " | ".join([name, *(f"{cost:.5f} | {hit:.2%}" for cost, hit in rows[name].values())]) + " |",
                err=True,
            )
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    run_command(main, "scripts/studies/state_rounding.py")
