"""Bits per byte and perplexity of a checkpoint on text.

    python -m qat.evaluate CHECKPOINT --data heldout.jsonl --json

`tmexport.documents` says what is scored; `runtime_ref.perplexity` gives the same for an exported file.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("evaluate", "python -m qat.evaluate")

import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from qat.data import find_files, is_dataset, load_tokenizer, read_documents
from qat.losses import distillation_loss
from qat.model import LanguageModel, load_model
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.options import threads_option
from tmexport.cli.progress import progress_bar
from tmexport.documents import Document, Score, encode_documents, score_documents, start_token
from tmexport.errors import UsageError
from tmexport.evidence import made_with
from tmexport.model import Model
from tmexport.threads import default_threads

_SEGMENT = 2048  # tokens a forward pass; the state goes from one to the next


def documents_in(data: Sequence[Path], tokenizer: Path, config: Model) -> list[Document]:
    """The documents of text files and data sets, tokenised for a model."""
    known = load_tokenizer(tokenizer, config.vocab_size)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in known.encode_batch_fast(list(texts), add_special_tokens=False)]

    start = start_token(config.eos_token_id, known.token_to_id)
    files = find_files(data)
    texts = (text for path in files for text in read_documents(path))
    total = sum(path.stat().st_size for path in files) if not any(map(is_dataset, files)) else None
    with progress_bar("tokenising", total, unit="bytes") as bar:
        return list(encode_documents(texts, encode, start, bar.advance))


@torch.no_grad()
def score_document(model: LanguageModel, ids: np.ndarray) -> float:
    """The sum of the nats of ids[1:], each given everything before it."""
    nats, states = 0.0, model.fresh_states()
    device = model.head_weight.device
    for start in range(0, len(ids) - 1, _SEGMENT):
        part = torch.from_numpy(ids[start : start + _SEGMENT + 1].astype(np.int64)).to(device)[None]
        hidden: Tensor = model.hidden(part[:, :-1], states)
        loss = distillation_loss(hidden, model.head_weight, part[:, 1:])
        nats += loss.cross_entropy.item() * (part.shape[1] - 1)
    return nats


def end_of_text_id(config: Model, tokenizer: Path) -> int:
    """The model's end-of-text token, from its config or else from its tokenizer."""
    if config.eos_token_id is not None:
        return config.eos_token_id
    for token in json.loads(tokenizer.read_text(encoding="utf-8-sig")).get("added_tokens", []):
        if token["content"] == "<|endoftext|>":
            return token["id"]
    raise UsageError(f"{tokenizer}: has no <|endoftext|> token, and config.json names no eos_token_id; add one there")


def find_tokenizer(folder: Path, given: Path | None) -> Path:
    """The tokenizer.json of a checkpoint folder, or the one given in its place."""
    path = given or folder / "tokenizer.json"
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the model's tokenizer.json with --tokenizer")
    return path


def evaluate(
    folder: Path, data: list[Path], tokenizer: Path | None = None, model: LanguageModel | None = None
) -> Score:
    """Score all documents of `data` with the checkpoint in `folder`, as `tmexport.documents` says; model: what to run in its place."""
    documents = documents_in(data, find_tokenizer(folder, tokenizer), open_checkpoint(folder).config)
    model = model or load_model(folder)
    with progress_bar("evaluating", sum(d.scored for d in documents), unit="tokens") as bar:

        def nats_of(ids: np.ndarray) -> float:
            nats = score_document(model, ids)
            bar.advance(len(ids) - 1)
            return nats

        return score_documents(documents, nats_of)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path),
    help="Text, JSON Lines, Parquet or a folder; repeatable.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer.json, if the checkpoint has none.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(checkpoint: Path, data: tuple[Path, ...], tokenizer: Path | None, threads: int | None, as_json: bool) -> None:
    """Bits per byte and perplexity of CHECKPOINT (a folder) on text.

    \b
    Example:
      tmexport evaluate out/student --data heldout.jsonl --json
    """
    torch.set_num_threads(threads or default_threads())
    score = evaluate(checkpoint, list(data), tokenizer)
    if as_json:
        texts = [path for path in find_files(data) if not is_dataset(path)]
        given = [word for path in data for word in ("--data", str(path) if is_dataset(path) else path)]
        click.echo(
            json.dumps(score.as_dict() | made_with(["tmexport", "evaluate", checkpoint, *given], checkpoint, texts))
        )
    else:
        click.echo(f"{score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f}, {score.tokens} tokens")
