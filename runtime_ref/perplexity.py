"""Perplexity and bits per byte of a GGUF model on a text.

    python -m runtime_ref.perplexity MODEL.gguf heldout.txt

There are no windows: a document is read as one stream with the recurrent state carried through, whatever its length. A
.jsonl file has one document in each line's "text"; any other file is one document. Every document starts from an empty
state with the end-of-text token before it (if the model has none, its first token is not scored). Bits per byte divides
by the UTF-8 bytes of the documents. This is what `qat.evaluate` does too, so the two can be compared.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("perplexity", "python -m runtime_ref.perplexity")

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from runtime_ref.arithmetic import DEFAULT, HELP, PRESETS
from runtime_ref.command import compile_kernels
from runtime_ref.model import Model
from runtime_ref.sampling import log_probabilities
from runtime_ref.tokenizer import Tokenizer
from tmexport.cli.progress import progress_bar
from tmexport.errors import UsageError


@dataclass(frozen=True)
class Score:
    """tokens: how many were scored; perplexity a token; bits_per_byte of the text."""

    tokens: int
    perplexity: float
    bits_per_byte: float


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 file.

    Raises:
        UsageError: it is missing, not UTF-8, or a .jsonl line has no string "text".
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            documents.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError, RecursionError):
            documents.append(None)
        if not isinstance(documents[-1], str):
            raise UsageError(f'{path}: line {number} has no string "text"; expected {{"text": "..."}} on every line')
    return documents


def score_tokens(model: Model, ids: list[int], on_progress: Callable[[int], None] = lambda n: None) -> float:
    """The sum of the nats of ids[1:], each given everything before it, from an empty state."""
    nats, at = 0.0, 1
    targets = np.asarray(ids, np.int64)
    for logits in model.score(model.new_state(), ids[:-1]):
        nats -= float(log_probabilities(logits, targets[at : at + len(logits)]).sum())
        at += len(logits)
        on_progress(len(logits))
    return nats


def end_of_text(model: Model, tokenizer: Tokenizer) -> int | None:
    """The token that precedes a document: the one the file names, else <|endoftext|>; None without either."""
    named = model.config.eos_token_id
    return tokenizer.token_id("<|endoftext|>") if named is None else named


def score_documents(
    model: Model, tokenizer: Tokenizer, documents: list[str], on_progress: Callable[[int], None] = lambda n: None
) -> Score:
    """Score documents as the module's docstring says.

    Raises:
        UsageError: there is no token to score.
    """
    start = end_of_text(model, tokenizer)
    nats, tokens, text_bytes = 0.0, 0, 0
    for document in documents:
        ids = ([] if start is None else [start]) + tokenizer.encode(document)
        if len(ids) < 2:
            continue
        nats += score_tokens(model, ids, on_progress)
        tokens += len(ids) - 1
        text_bytes += len(document.encode())
    if not tokens:
        raise UsageError("the text holds no token to score")
    return Score(tokens, math.exp(min(700.0, nats / tokens)), nats / math.log(2) / text_bytes)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(path_type=Path))
@click.argument("text_path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: the cores this process may use.")
@click.option("--profile", type=click.Choice(list(PRESETS)), default=DEFAULT, show_default=True, help=HELP)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def perplexity(model_path: Path, text_path: Path, threads: int | None, profile: str, as_json: bool) -> None:
    """Tokens, perplexity and bits per byte of MODEL.gguf on FILE.

    A .jsonl file has one document in each line's "text", any other file is one document; a document is read as one stream,
    from an empty state, after an end-of-text token. No windows.

    \b
    Example:
      python -m runtime_ref.perplexity model.gguf heldout.txt --json
    """
    documents = read_documents(text_path)
    tokenizer = Tokenizer.from_gguf(model_path)
    model = Model.load(model_path, profile, threads)
    compile_kernels(model)
    with progress_bar("scoring", sum(len(tokenizer.encode(d)) for d in documents)) as bar:
        score = score_documents(model, tokenizer, documents, bar.advance)
    if as_json:
        click.echo(json.dumps(asdict(score) | {"profile": profile}))
    else:
        click.echo(f"tokens {score.tokens}\nperplexity {score.perplexity:.4f}\nbits per byte {score.bits_per_byte:.4f}")
