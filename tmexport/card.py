"""The model card of a checkpoint folder, README.md as the Hub reads it: what the folder's own files say, and evaluations of it.

Nothing is taken on trust: an evaluation is the JSON object that `tmexport evaluate`, `perplexity` or `zero-shot` printed, and
it counts only if the files that it was measured on are in the folder, by their SHA-256.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmexport.checkpoint import Checkpoint, open_checkpoint
from tmexport.errors import CheckpointError, TmexportError, UsageError
from tmexport.evidence import model_digests
from tmexport.files import atomic_write, file_in, read_text
from tmexport.inspect import Summary, inspect_path
from tmexport.model.dialects import tmexport_mamba2

NAME = "README.md"
_LARGEST = 2**26
_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_SETTINGS = ("steps", "batch_size", "seq_len", "lr", "kd_weight", "temperature", "seed")  # of a recipe, in this order


@dataclass(frozen=True)
class Said:
    """What the files cannot say: ids on the Hub, the licence's too."""

    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    license: str | None = None

    def __post_init__(self) -> None:
        for name in (self.base_model, *self.datasets, self.license):
            if name is not None and not _HUB_ID.fullmatch(name):
                raise UsageError(f"{name!r} is no id of the Hub; expected NAME or OWNER/NAME, without spaces")


@dataclass(frozen=True)
class Evaluation:
    """One measured object: the file it is in, the command, and rows of (on what, metric, value, standard error)."""

    file: str
    command: str
    rows: tuple[tuple[str, str, float, float | None], ...]


def write_card(folder: Path, said: Said, evaluations: Sequence[Path] = (), overwrite: bool = False) -> Path:
    """Write the card into a checkpoint folder; its path.

    Raises:
        TmexportError: there is a README.md and `overwrite` is not set, or an evaluation is of other files.
        CheckpointError, ConfigError: the folder is no checkpoint.
    """
    checkpoint, path = open_checkpoint(folder), folder / NAME
    if path.exists() and not overwrite:
        raise TmexportError(f"{path}: is there already; --overwrite replaces it")
    digests = model_digests(folder)
    read = [read_evaluation(file, folder, digests) for file in evaluations]
    with atomic_write(path) as file:
        file.write(card_text(checkpoint, inspect_path(folder), digests, said, read).encode())
    return path


def read_evaluation(path: Path, folder: Path, digests: Mapping[str, str]) -> Evaluation:
    """An evaluation, after checking that it was measured on the folder's files.

    Raises:
        TmexportError: it is no such JSON object, or is of other files.
    """
    try:
        found = json.loads(read_text(path, _LARGEST))
        command, measured = found["command"], dict(found["model_sha256"])
        rows = tuple(_rows(found))
    except OSError as error:
        raise TmexportError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise TmexportError(
            f"{path}: is not what `tmexport evaluate`, `perplexity` or `zero-shot` print with --json ({type(error).__name__}: {error})"
        ) from None
    for name, digest in measured.items():
        if digests.get(name) != digest:
            has = f"has {digests[name][:16]}" if name in digests else "has no such file"
            raise TmexportError(f"{path}: was measured on {name} with SHA-256 {str(digest)[:16]}...; {folder} {has}")
    return Evaluation(path.name, str(command), rows)


def _rows(found: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    if "tasks" not in found:
        texts = ", ".join(found["text_sha256"]) or "the text of the command"
        return [(texts, name, float(found[name]), None) for name in ("bits_per_byte", "perplexity")]
    rows = []
    for task, result in found["tasks"].items():
        for name, metric in result["metrics"].items():
            stderr = metric["stderr"]
            rows.append((f"{task}, {int(result['examples'])} examples", name, float(metric["value"]), stderr if stderr is None else float(stderr)))  # fmt: skip
    return rows


def card_text(
    checkpoint: Checkpoint, summary: Summary, digests: Mapping[str, str], said: Said, evaluations: Sequence[Evaluation]
) -> str:
    """The whole card."""
    name = checkpoint.path.resolve().name
    parts = [
        ["---", *(f"{key}: {_yaml(value)}" for key, value in front_matter(name, checkpoint, said, evaluations).items()), "---"],
        [f"# {name}", "", _sentence(checkpoint, summary, said)],
        ["## Run it", "", *_running(name, checkpoint)],
        ["## How it was made", "", *_making(checkpoint.path)],
        ["## Evaluation", "", *_evaluation(evaluations)],
        ["## Files", "", "| file | SHA-256 |", "|---|---|", *(f"| `{_plain(f)}` | `{d}` |" for f, d in digests.items())],
    ]  # fmt: skip
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def front_matter(name: str, checkpoint: Checkpoint, said: Said, evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The card's metadata; what is not known has no key."""
    kinds = sorted({form.kind for form in checkpoint.coded.values()})
    branches = {branch.kind for block in checkpoint.config.blocks for branch in block.branches}
    metrics = {"acc": "accuracy", "acc_norm": "accuracy", "perplexity": "perplexity", "bits_per_byte": "bits_per_byte"}
    rows = [row for evaluation in evaluations for row in evaluation.rows]
    found: dict[str, Any] = {
        "library_name": "tmexport" if kinds or checkpoint.config.family == tmexport_mamba2.NAME else "transformers",
        "pipeline_tag": "text-generation",
        "license": said.license,
        "base_model": said.base_model,
        "base_model_relation": said.base_model and ("quantized" if kinds else "finetune"),
        "datasets": list(said.datasets),
        "metrics": list(dict.fromkeys(metrics[row[1]] for row in rows)),
        "tags": [*kinds, *sorted(branches), "state-space-model", "cpu"],
        "model-index": [{"name": name, "results": [_result(*row) for row in rows]}] if rows else [],
    }
    return {key: value for key, value in found.items() if value}


def _result(where: str, metric: str, value: float, _: float | None) -> dict[str, Any]:
    kind = where.split(",")[0]
    dataset = {"type": kind, "name": where}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [{"type": metric, "value": value}]}


def _yaml(value: Any) -> str:
    """JSON is YAML, but for surrogates, which ensure_ascii would write."""
    return json.dumps(value, ensure_ascii=False)


def _plain(text: object) -> str:
    """Text inside backticks and table cells."""
    return " ".join(str(text).split()).replace("`", "'").replace("|", "/")


def _sentence(checkpoint: Checkpoint, summary: Summary, said: Said) -> str:
    config = checkpoint.config
    size = f"{summary.parameters:,} parameters in {summary.bytes / 1e6:.1f} MB"
    forms: dict[str, list[str]] = {}
    for role, form in checkpoint.coded.items():
        forms.setdefault(f"{form.kind} in groups of {form.group_size}", []).append(role)
    stored = "; ".join(f"{', '.join(roles)}: {form}" for form, roles in forms.items())
    ratio = summary.as_dict()["zero_ratio"]
    lines = [f"A {config.family} of {len(config.blocks)} blocks, d_model {config.d_model}: {size}."]
    lines += [f"Low-bit weights: {stored}." if stored else "Its weights are in full precision."]
    lines += [f"Zero ratio {ratio:.4f}."] if ratio is not None else []
    lines += [f"Base model: {said.base_model}."] if said.base_model else []
    lines += ["No licence was given for this card; the base model's and the text's apply."] if not said.license else []
    return " ".join(lines)


def _running(name: str, checkpoint: Checkpoint) -> list[str]:
    shell = [
        "pip install tmexport", f"tmexport gguf {_plain(name)} model.gguf", f"tmexport verify {_plain(name)} model.gguf",
        'tmexport generate model.gguf --prompt "Once"',
    ]  # fmt: skip
    python = [
        *(["import tmexport.hf"] if checkpoint.coded else []),
        "from transformers import AutoModelForCausalLM", "", f"model = AutoModelForCausalLM.from_pretrained({name!r})",
    ]  # fmt: skip
    said = ["```sh", *shell, "```", ""]
    if checkpoint.config.family == tmexport_mamba2.NAME:
        return [
            *said,
            "Stock programs (transformers, llama.cpp) do not compute this architecture and refuse its files.",
        ]
    return [*said, "With transformers:", "", "```python", *python, "```"]


def _making(folder: Path) -> list[str]:
    """From the provenance in config.json, and a training run's recipe.toml and metrics.jsonl."""
    lines = []
    quantization = json.loads(read_text(file_in(folder, "config.json"), _LARGEST)).get("quantization_config") or {}
    provenance = quantization.get("provenance")
    if isinstance(provenance, dict):
        lines += [f"- {_plain(key)}: `{_plain(json.dumps(value))}`" for key, value in provenance.items()]
    lines += _training(folder)
    return lines or ["The folder's files do not say."]


def _training(folder: Path) -> list[str]:
    if not (folder / "recipe.toml").exists():
        return []
    path = file_in(folder, "recipe.toml")
    try:
        section, recipe = next(iter(tomllib.loads(read_text(path, _LARGEST)).items()))
        settings = ", ".join(f"{key} {recipe[key]}" for key in _SETTINGS if key in recipe)
        last = json.loads(read_text(file_in(folder, "metrics.jsonl"), _LARGEST).splitlines()[-1])
        tokens, score = last["tokens"], last.get("held_out_bits_per_byte")
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{path}: it or metrics.jsonl is not a training run's ({error})") from None
    teacher = "--from-scratch" if section == "teacher" else "--teacher TEACHER"
    lines = [f"- trained: `tmexport train {teacher} --recipe recipe.toml --data TEXT --out {_plain(folder.resolve().name)}`"]  # fmt: skip
    lines += [f"- recipe.toml: {_plain(settings)}", f"- tokens trained on: {tokens:,}"]
    return lines + ([f"- bits per byte on its held-out text at the end: {score:.4f}"] if score is not None else [])


def _evaluation(evaluations: Sequence[Evaluation]) -> list[str]:
    if not evaluations:
        return ["Not evaluated."]
    lines = ["| on | metric | value | command |", "|---|---|---|---|"]
    for evaluation in evaluations:
        for where, metric, value, stderr in evaluation.rows:
            shown = f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
            lines.append(f"| {_plain(where)} | {_plain(metric)} | {shown} | `{_plain(evaluation.command)}` |")
    return [*lines, "", "Each was measured on the files below, by their SHA-256."]
