"""Every training-free ternary method, and trained students, in one table: bits per byte on held-out text.

    python scripts/compare_baselines.py --teacher out/teacher --data train.jsonl --held-out heldout.jsonl --student out/student

recovery = (rounding - method) / (rounding - teacher), in bits per byte. The last line is one JSON object.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import click
import numpy as np
import torch

from qat.baselines import METHODS
from qat.data import Batches, TokenStream, tokenize_files
from qat.evaluate import documents_of, end_of_text_id, find_tokenizer, score_document
from qat.model import Mamba2LM, load_model

_PATH = click.Path(path_type=Path)


@click.command()
@click.option("--teacher", required=True, type=_PATH, help="checkpoint folder")
@click.option("--student", "students", multiple=True, type=_PATH, help="trained ternary checkpoint; repeatable")
@click.option("--data", multiple=True, required=True, type=_PATH, help="text to calibrate on; repeatable")
@click.option("--held-out", multiple=True, required=True, type=_PATH, help="text to score; repeatable")
@click.option("--sequences", default=32, show_default=True, help="calibration sequences of 256 tokens")
@click.option("--group-size", default=256, show_default=True, help="64, 128 or 256")
@click.option("--threads", default=2, show_default=True, help="CPU threads")
def main(
    teacher: Path,
    students: tuple[Path, ...],
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    sequences: int,
    group_size: int,
    threads: int,
) -> None:
    """Score all methods."""
    torch.set_num_threads(threads)
    model = load_model(teacher).requires_grad_(False)
    tokenizer = find_tokenizer(teacher, None)
    eos, vocab = end_of_text_id(model.config, tokenizer), model.config.vocab_size
    with tempfile.TemporaryDirectory() as cache:
        text = tokenize_files(data, tokenizer, vocab, eos, Path(cache))
        scored = tokenize_files(held_out, tokenizer, vocab, eos, Path(cache))
        ids = torch.from_numpy(Batches(np.array(text.tokens), 256, sequences, 0)(0)[:, :-1])
        scores = {"teacher": bits_per_byte(model, scored, eos)}
        for name, method in METHODS.items():
            scores[name] = bits_per_byte(method(model, ids, group_size), scored, eos)
            click.echo(f"{name}: {scores[name]:.4f}", err=True)
        for student in students:
            scores[f"QAT {student.name}"] = bits_per_byte(load_model(student), scored, eos)
    distance = scores["round to nearest"] - scores["teacher"]
    click.echo("| method | bits per byte | recovery |\n|---|---|---|")
    for name, score in scores.items():
        click.echo(f"| {name} | {score:.4f} | {(scores['round to nearest'] - score) / distance:.1%} |")
    click.echo(json.dumps({"bits_per_byte": scores, "group_size": group_size, "calibration_tokens": ids.numel()}))


def bits_per_byte(model: Mamba2LM, stream: TokenStream, eos: int) -> float:
    """Of all documents of a stream."""
    return sum(score_document(model, ids) for ids in documents_of(stream.tokens, eos)) / math.log(2) / stream.text_bytes


if __name__ == "__main__":
    main()
