"""Perplexity and bits per byte of a GGUF model on a text.

    python -m runtime_ref.perplexity MODEL.gguf heldout.txt

There are no windows: a document is read as one stream with the recurrent state carried through, whatever its length.
`tmexport.documents` says what is scored; `qat.evaluate` gives the same for a checkpoint, so the two can be compared.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("perplexity", "python -m runtime_ref.perplexity")

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np

from runtime_ref.command import compile_kernels, profile_option
from runtime_ref.model import Model
from runtime_ref.sampling import log_probabilities
from runtime_ref.tokenizer import Tokenizer
from tmexport.cli.options import threads_option
from tmexport.cli.progress import progress_bar
from tmexport.documents import encode_documents, read_documents, score_documents, start_token
from tmexport.evidence import made_with


def score_tokens(
    model: Model, ids: Sequence[int] | np.ndarray, on_progress: Callable[[int], None] = lambda n: None
) -> float:
    """The sum of the nats of ids[1:], each given everything before it, from an empty state."""
    nats, at = 0.0, 1
    targets = np.asarray(ids, np.int64)
    for logits in model.score(model.new_state(), targets[:-1].tolist()):
        nats -= float(log_probabilities(logits, targets[at : at + len(logits)]).sum())
        at += len(logits)
        on_progress(len(logits))
    return nats


def end_of_text(model: Model, tokenizer: Tokenizer) -> int | None:
    """The token that precedes a document: the one the file names, else <|endoftext|>; None without either."""
    return start_token(model.config.eos_token_id, tokenizer.token_id)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(path_type=Path))
@click.argument("text_path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--tokenizer", "tokenizer_path", type=click.Path(path_type=Path),
              help="A tokenizer.json. Default: the one in the file, or else the file's own vocabulary.")  # fmt: skip
@threads_option
@profile_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def perplexity(
    model_path: Path, text_path: Path, tokenizer_path: Path | None, threads: int | None, profile: str, as_json: bool
) -> None:
    """Tokens, perplexity and bits per byte of MODEL.gguf on FILE.

    A .jsonl file has one document in each line's "text", any other file is one document; a document is read as one stream,
    from an empty state, after an end-of-text token. No windows.

    \b
    Example:
      tmexport perplexity model.gguf heldout.txt --json
    """
    texts = list(read_documents(text_path))
    tokenizer = Tokenizer.from_gguf(model_path, tokenizer_path)
    model = Model.load(model_path, profile, threads)
    with progress_bar("tokenising", sum(map(len, texts)), unit="characters") as bar:
        documents = list(encode_documents(texts, tokenizer.encode_all, end_of_text(model, tokenizer), bar.advance))
    if any(d.scored for d in documents):  # else there is nothing to compile for
        compile_kernels(model)
    with progress_bar("scoring", sum(d.scored for d in documents), unit="tokens") as bar:
        score = score_documents(documents, lambda ids: score_tokens(model, ids, bar.advance))
    if as_json:
        command = ["tmexport", "perplexity", model_path, text_path, "--profile", profile]
        click.echo(json.dumps(score.as_dict() | {"profile": profile} | made_with(command, model_path, [text_path])))
    else:
        click.echo(f"tokens {score.tokens}\nperplexity {score.perplexity:.4f}\nbits per byte {score.bits_per_byte:.4f}")
