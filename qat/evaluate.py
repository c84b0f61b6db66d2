"""Bits per byte and perplexity of a checkpoint on text.

    python -m qat.evaluate CHECKPOINT --data heldout.jsonl --json

Every document starts from an empty state with the end-of-text token before it; the state is carried through the whole
document, whatever its length, and every token of the document is scored. bits_per_byte is the sum of the tokens' nats /
ln 2 / the UTF-8 bytes of the text, so it compares models with different tokenizers; perplexity is exp(nats / token).
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("evaluate", "python -m qat.evaluate")

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from qat.data import tokenize_files
from qat.errors import DataError
from qat.losses import distillation_loss
from qat.model import Mamba2LM, load_model
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.progress import progress_bar
from tmexport.config import Mamba2Config
from tmexport.errors import UsageError
from tmexport.threads import default_threads

_SEGMENT = 2048  # tokens a forward pass; the state goes from one to the next


@dataclass(frozen=True)
class Score:
    """tokens: how many were scored; nats: their sum."""

    tokens: int
    nats: float
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.nats / self.tokens))


def documents_of(tokens: np.ndarray, eos: int) -> Iterator[np.ndarray]:
    """The documents of a stream, each with the end-of-text token that precedes it."""
    starts = np.flatnonzero(tokens == eos)
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if end - start > 1:
            yield np.asarray(tokens[start:end])


@torch.no_grad()
def score_document(model: Mamba2LM, ids: np.ndarray) -> float:
    """The sum of the nats of ids[1:], each given everything before it."""
    nats, states = 0.0, model.fresh_states()
    device = model.head_weight.device
    for start in range(0, len(ids) - 1, _SEGMENT):
        part = torch.from_numpy(ids[start : start + _SEGMENT + 1].astype(np.int64)).to(device)[None]
        hidden: Tensor = model.backbone(part[:, :-1], states)
        loss = distillation_loss(hidden, model.head_weight, part[:, 1:])
        nats += loss.cross_entropy.item() * (part.shape[1] - 1)
    return nats


def end_of_text_id(config: Mamba2Config, tokenizer: Path) -> int:
    """The model's end-of-text token, from its config or else from its tokenizer."""
    if config.eos_token_id is not None:
        return config.eos_token_id
    for token in json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", []):
        if token["content"] == "<|endoftext|>":
            return token["id"]
    raise UsageError(f"{tokenizer}: has no <|endoftext|> token, and config.json names no eos_token_id; add one there")


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """The tokenizer.json of a checkpoint folder, or the one given in its place."""
    path = given or folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the model's tokenizer.json with --tokenizer")
    return path


def evaluate(folder: Path, data: list[Path], tokenizer: Path | None = None) -> Score:
    """Score all documents of `data` with the checkpoint in `folder`."""
    config = open_checkpoint(folder).config
    tokenizer = find_tokenizer(folder, tokenizer)
    eos = end_of_text_id(config, tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        stream = tokenize_files(data, tokenizer, config.vocab_size, eos, Path(cache))
        model = load_model(folder)
        count, nats = 0, 0.0
        with progress_bar("evaluating", len(stream.tokens), unit="tokens") as bar:
            for ids in documents_of(stream.tokens, eos):
                nats += score_document(model, ids)
                count += len(ids) - 1
                bar.advance(len(ids))
    if not count:
        raise DataError("the text holds no token to score")
    return Score(count, nats, stream.text_bytes)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="text, JSON Lines, Parquet or a folder; repeatable",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="tokenizer.json, if the checkpoint has none")
@click.option("--threads", type=click.IntRange(1), help="CPU threads")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def main(checkpoint: Path, data: tuple[Path, ...], tokenizer: Path | None, threads: int | None, as_json: bool) -> None:
    """Bits per byte and perplexity of CHECKPOINT (a folder) on text.

    Example: python -m qat.evaluate out/student --data heldout.jsonl --json
    """
    torch.set_num_threads(threads or default_threads())
    score = evaluate(checkpoint, list(data), tokenizer)
    result = {**asdict(score), "bits_per_byte": score.bits_per_byte, "perplexity": score.perplexity}
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f}, {score.tokens} tokens")
