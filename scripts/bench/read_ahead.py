"""How much faster texts grow that are read ahead (docs/serve.md) than a token at a time, on one model; both in turns.

Example: python scripts/bench/read_ahead.py smollm2.gguf --count 200

Texts: this repository's own code and JSON made from its numbers, a page said twice, and prose, greedy and drawn. Every text is made
both ways in every round, and must be the same. Of a model without a tokenizer only tokens that repeat themselves: forced, that is
drawn from a page whatever the logits say. The last line on stdout is one JSON object: the best rates of each, in tokens a second.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from runtime_ref.command import compile_kernels, profile_option
from runtime_ref.model import Model
from runtime_ref.sampling import Read, Sampling, continue_tokens
from runtime_ref.speculative import Costs, Drafts
from runtime_ref.tokenizer import Tokenizer
from tmexport.cli.app import run_command
from tmexport.cli.options import PATH, threads_option
from tmexport.errors import TokenizerError, UsageError
from tmexport.gguf.reader import open_gguf

ROOT = Path(__file__).parents[2]
PAGE = 150  # tokens of a page that is forced


def texts() -> Iterator[tuple[str, str, Sampling]]:
    """Names, prompts, and how to choose."""
    code = (ROOT / "tmexport" / "errors.py").read_text()[:2500]
    records = [
        {"id": n, "name": f"layer-{n}", "shape": [64 * n, 128], "kind": "ternary", "ready": True} for n in range(24)
    ]
    prose = (ROOT / "README.md").read_text()[:1200]
    yield "code", f"{code}\n\n\nclass SocketError(TmexportError):\n", Sampling()
    yield "json", json.dumps(records, indent=1)[:-2] + ",\n {\n", Sampling()
    yield "page said twice", f"{prose}\n\n---\n\n{prose}\n\n---\n\n{prose[:200]}", Sampling()
    yield "prose, greedy", prose, Sampling()
    for seed in (1, 2):
        yield f"prose, drawn {seed}", prose, Sampling(1.0, seed=seed)


class Forced:
    """A model whose logits are computed, and then say what comes next on a page."""

    def __init__(self, model: Model, page: list[int]) -> None:
        self._model, self._page, self.new_state = model, page, model.new_state

    def _said(self, at: int, row: np.ndarray) -> np.ndarray:
        row[self._page[at % len(self._page)]] = np.inf
        return row

    def prefill(self, state: Any, tokens: list[int]) -> np.ndarray:
        return self._said(len(tokens), self._model.prefill(state, tokens))

    def decode(self, state: Any, token: int) -> np.ndarray:
        return self._said(state.tokens, self._model.decode(state, token))

    def advance(self, state: Any, token: int, draft: list[int], take: Any) -> int | None:
        at = iter(range(state.tokens + 1, 10**9))
        return self._model.advance(state, token, draft, lambda row: take(self._said(next(at), row)))


def decode(model: Any, ids: list[int], count: int, how: Sampling, read: Read | None) -> tuple[list[int], float]:
    """The tokens, and how many of them a second after the first."""
    begun: list[float] = []
    made = list(continue_tokens(model, ids, count, how, None, (), lambda row: begun.append(time.perf_counter()), read))
    return made, (len(made) - 1) / (time.perf_counter() - begun[0])


@click.command()
@click.argument("path", metavar="MODEL", type=PATH)
@click.option("-n", "--count", type=click.IntRange(2), default=200, show_default=True, help="Tokens of each text.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@threads_option
@profile_option
def main(path: Path, count: int, rounds: int, threads: int | None, profile: str) -> None:
    """Measure reading ahead on MODEL, a .gguf file."""
    model = Model.load(path, profile, threads)
    compile_kernels(model)
    page = [int(t) for t in np.random.default_rng(1).integers(0, model.config.vocab_size, PAGE)]
    cases: list[tuple[str, Any, list[int], Sampling]]
    try:
        tokenizer = Tokenizer.from_gguf(open_gguf(path))
        cases = [(name, model, tokenizer.prompt(text), how) for name, text, how in texts()]
    except TokenizerError:
        cases = [("forced page", Forced(model, page), page, Sampling())]
    found = {}
    for name, runs, ids, how in cases:
        rates: dict[str, list[float]] = {"plain": [], "ahead": []}
        for _ in range(rounds):
            costs = Costs()
            plain, rate = decode(runs, ids, count, how, None)
            rates["plain"].append(rate)
            ahead, rate = decode(runs, ids, count, how, Drafts(runs, costs, ids).read)
            rates["ahead"].append(rate)
            if plain != ahead:
                raise UsageError(f"{name}: the texts differ")
        best = {key: max(values) for key, values in rates.items()}
        found[name] = best | {"ratio": best["ahead"] / best["plain"]}
        sizes = ", ".join(f"{size} tokens {costs.of(size):.2f}" for size in (2, 4, 8, 16))
        click.echo(
            f"{name}: {best['plain']:.1f} -> {best['ahead']:.1f} tokens/s, {found[name]['ratio']:.2f} x (passes: {sizes})"
        )
    click.echo(
        json.dumps({"model": path.name, "profile": profile, "threads": model.threads, "tokens": count, "texts": found})
    )


if __name__ == "__main__":
    run_command(main, "scripts/bench/read_ahead.py")
