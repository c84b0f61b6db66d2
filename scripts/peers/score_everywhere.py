"""One trained model, four places: bits per byte of the same text in PyTorch, in runtime_ref and in llama.cpp.

    python scripts/peers/score_everywhere.py student/ student.gguf heldout.jsonl --llama-python .lcp/bin/python

Each document starts from an empty state after the end-of-text token and is cut after --tokens tokens. llama.cpp comes from
pip's llama-cpp-python, in the Python that --llama-python names. The last line is one JSON object.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import torch

from qat.evaluate import score_document
from qat.model import load_model
from runtime_ref.model import Model
from runtime_ref.perplexity import end_of_text, read_documents, score_tokens
from runtime_ref.tokenizer import Tokenizer
from tmexport.cli.app import run_command

# Reads a JSON list of documents (lists of token ids), prints the nats of all tokens but each document's first. Weights lie as in
# the file: in the layout for AMX, llama-cpp-python 0.3.36 built with GCC 12 dies of SIGILL at Q8_0 matrices (docs/ptq.md says why).
LLAMA = """
import json, sys
import llama_cpp.llama_cpp as low
import numpy as np
from llama_cpp import Llama
defaults = low.llama_model_default_params
def plain():
    found = defaults()
    found.use_extra_bufts = False
    return found
low.llama_model_default_params = plain
documents = json.load(sys.stdin)
llama = Llama(sys.argv[1], n_ctx=max(map(len, documents)), logits_all=True, n_threads=int(sys.argv[2]), verbose=False)
nats = 0.0
for ids in documents:
    llama.reset()
    llama.eval(ids[:-1])
    logits = np.array(llama.scores[: len(ids) - 1], np.float64)
    top = logits.max(1)
    found = logits[np.arange(len(ids) - 1), ids[1:]]
    nats -= float((found - top - np.log(np.exp(logits - top[:, None]).sum(1))).sum())
print("nats", nats)
"""


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("gguf", type=click.Path(path_type=Path, exists=True))
@click.argument("text", type=click.Path(path_type=Path, exists=True))
@click.option("--llama-python", default=sys.executable, help="The Python that has llama-cpp-python.")
@click.option("--tokens", default=4096, show_default=True, help="At most so many tokens of a document.")
@click.option("--threads", default=2, show_default=True)
def main(checkpoint: Path, gguf: Path, text: Path, llama_python: str, tokens: int, threads: int) -> None:
    """Score the documents of TEXT with CHECKPOINT and with GGUF, which was exported from it."""
    torch.set_num_threads(threads)
    tokenizer = Tokenizer.from_gguf(gguf)
    runtime = {profile: Model.load(gguf, profile, threads) for profile in ("exact", "fast")}
    start = end_of_text(runtime["exact"], tokenizer)
    begin = [] if start is None else [start]
    documents = [(begin + tokenizer.encode(document))[: tokens + 1] for document in read_documents(text)]
    documents = [ids for ids in documents if len(ids) > 1]
    if not documents:
        raise click.ClickException(f"{text}: holds no token to score")
    text_bytes = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in documents)

    model = load_model(checkpoint)
    nats = {"torch": sum(score_document(model, np.array(ids)) for ids in documents)}
    for profile, loaded in runtime.items():
        nats[f"runtime_ref, {profile}"] = sum(score_tokens(loaded, ids) for ids in documents)
    command = [llama_python, "-c", LLAMA, str(gguf), str(threads)]
    answer = subprocess.run(command, input=json.dumps(documents), capture_output=True, text=True, check=False)
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise click.ClickException(f"{llama_python} could not run llama.cpp: {last}")
    nats["llama.cpp"] = float(answer.stdout.split("nats")[-1])

    scores = {name: value / math.log(2) / text_bytes for name, value in nats.items()}
    for name, score in scores.items():
        click.echo(f"{name:<20} {score:.6f} bits per byte, {score / scores['torch'] - 1:+.2e} of torch's")
    click.echo(json.dumps({"documents": len(documents), "tokens": sum(map(len, documents)) - len(documents),
                           "bits_per_byte": scores}))  # fmt: skip


if __name__ == "__main__":
    run_command(main, "scripts/peers/score_everywhere.py")
