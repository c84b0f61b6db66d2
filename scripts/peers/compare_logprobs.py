"""Compare the log probabilities of a stock llama.cpp with ours, token by token, on the same GGUF.

    python scripts/peers/compare_logprobs.py demo_out/student.gguf --prompt "Fellow citizens" -n 64

llama.cpp (the xllamacpp wheel) continues the prompt greedily; at each position its log probability of its own most
likely token is compared with ours for that token, in both profiles. The last line is one JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from runtime_ref.model import Model
from runtime_ref.sampling import log_probabilities
from tests.llama import Llama
from tmexport.cli.app import run_command


def differences(path: Path, tokens: list[int], found: list[tuple[int, float]], profile: str) -> np.ndarray:
    """Ours minus llama.cpp's log probability of each token it chose: fp64 [len(found)]."""
    model = Model.load(path, profile=profile)
    state = model.new_state()
    logits = model.prefill(state, tokens)
    out = []
    for token, log_probability in found:
        out.append(float(log_probabilities(logits[None], [token])[0]) - log_probability)
        logits = model.decode(state, token)
    model.close()
    return np.array(out)


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--prompt", default="Fellow citizens of the Senate", show_default=True)
@click.option("-n", "count", default=64, show_default=True, help="Positions to compare.")
def main(model: Path, prompt: str, count: int) -> None:
    """Compare llama.cpp's log probabilities with ours on MODEL, a GGUF with a tokenizer."""
    llama = Llama(model)
    tokens = llama.tokenize(prompt)
    found = llama.greedy(tokens, count)
    worst = {profile: float(np.abs(differences(model, tokens, found, profile)).max()) for profile in ("fast", "exact")}
    click.echo(json.dumps({"model": str(model), "positions": count, "largest_difference": worst}))


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_logprobs.py")
