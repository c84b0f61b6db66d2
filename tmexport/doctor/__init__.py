"""What a GGUF of any program is: its types and whose they are, what is wrong with it, and whether a stock file can hold the same.

Reads the header only, trusts nothing in it, and takes type ids that no stock llama.cpp knows. types.py is the table of types;
header.py reads; keys.py judges the keys; fix.py writes the one lossless transcode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmexport.doctor.fix import check_equal, write_stock
from tmexport.doctor.header import Header, layout_problems, open_bytes, read_header
from tmexport.doctor.keys import Problem, is_later_part, is_model, key_notes, key_problems
from tmexport.doctor.types import NO_WEIGHTS, Q2_0_G128, STOCK
from tmexport.errors import GGUFError, TmexportError
from tmexport.files import named_by_its_start, refuse_overwriting
from tmexport.gguf.kinds import is_part, wrong_kinds
from tmexport.gguf.names import TOKENIZER_JSON_KEY, config_from_metadata
from tmexport.gguf.reader import open_gguf
from tmexport.model.dialects import FAMILIES, tmexport_mamba2
from tmexport.tokenizer.gguf import has_vocabulary, vocabulary_as_json
from tmexport.tokenizer.parse import parse_tokenizer
from tmexport.types import GGMLType

__all__ = ["Diagnosis", "diagnose", "read_header", "write_fixed"]
OURS = "tmexport, runtime_ref"
_READ = {kind.name for kind in GGMLType}
# Our programs read all that these can be: what they refuse is a fault.
_NOTHING_MORE = ("mamba", "mamba2", tmexport_mamba2.NAME)


@dataclass
class Diagnosis:
    """What was found. problems: a sentence each; notes: what is no fault. fix: what `--fix` would write, or None."""

    path: str
    architecture: str | None = None
    types: dict[str, int] = field(default_factory=dict)
    variant: str = "no ternary tensors"
    loads: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fix: str | None = None


def diagnose(path: Path) -> Diagnosis:
    """Everything that can be said of a file without running it.

    Raises:
        UsageError: there is no such file.
    """
    data = open_bytes(path)
    result = Diagnosis(str(path))
    try:
        header = read_header(data)
    except GGUFError as error:
        start = bytes(data[:512])
        result.problems.append((None if start[:4] == b"GGUF" else named_by_its_start(start)) or str(error))
        return result
    architecture = header.metadata.get("general.architecture")
    result.architecture = architecture if isinstance(architecture, str) else None
    result.types = dict(Counter(tensor.fact.name for tensor in header.tensors))
    ternary = [tensor.fact for tensor in header.tensors if tensor.fact.ternary]
    if ternary:
        result.variant = Counter(fact.name for fact in ternary).most_common(1)[0][0]
    layout = layout_problems(header, data.size)
    problems = [*map(Problem, layout), *_foreign(header), *key_problems(path, header)]
    loads = [] if layout else _who_loads(header, problems)
    if result.architecture in FAMILIES and _alone(header):
        loads += _ours(path, header, problems, result.notes)
        loads = loads if not any(problem.ends for problem in problems) else [name for name in loads if name != STOCK]
    result.loads, result.problems = loads, [problem.text for problem in problems]
    result.notes += key_notes(header)
    foreign = [t for t in header.tensors if t.fact.loads != STOCK]
    if foreign and all(t.fact is Q2_0_G128 for t in foreign) and not layout:
        result.fix = f"{len(foreign)} tensors of Q2_0 with blocks of 128 as stock Q2_0 with blocks of 64, bit for bit"
    return result


def _foreign(header: Header) -> Iterator[Problem]:
    """A sentence for each type that stock llama.cpp does not load, or does not multiply with."""
    for fact in dict.fromkeys(tensor.fact for tensor in header.tensors if tensor.fact.loads != STOCK):
        count = sum(tensor.fact is fact or tensor.fact == fact for tensor in header.tensors)
        note = f": {fact.note}" if fact.note else ""
        yield Problem(f"{count} tensors are {fact.name}, which {fact.loads} loads and stock llama.cpp does not{note}")
    matrices = [
        t for t in header.tensors if t.fact.name in NO_WEIGHTS and len(t.shape) == 2 and t.name.endswith(".weight")
    ]
    for name, count in Counter(tensor.fact.name for tensor in matrices).items():
        yield Problem(f"{count} matrices are {name}, a type that llama.cpp does not multiply with")


def _who_loads(header: Header, problems: list[Problem]) -> list[str]:
    """The programs of others that know every type."""
    others = list(dict.fromkeys(t.fact.loads for t in header.tensors if t.fact.loads != STOCK))
    if others:
        return others if len(others) == 1 else []
    architecture = header.metadata.get("general.architecture")
    if architecture == tmexport_mamba2.NAME or any(problem.ends for problem in problems) or not header.tensors:
        return []
    if is_later_part(header.metadata):
        return []
    if header.metadata.get("tokenizer.ggml.model") == "none" and is_model(header.metadata):
        return []
    return [STOCK if architecture in FAMILIES else f"{STOCK}, if it knows the architecture {str(architecture)[:40]!r}"]


def _alone(header: Header) -> bool:
    """Whether a file is a whole model whose keys can be read."""
    keys = header.metadata
    return not any(wrong_kinds(keys)) and is_model(keys) and not is_part(keys)


def _ours(path: Path, header: Header, problems: list[Problem], notes: list[str]) -> list[str]:
    """Our programs, if they load a file of a family that they know; else, and for its tokenizer, why not is added."""
    refusal = _our_refusal(path)
    if refusal is not None and not problems:
        if header.metadata["general.architecture"] in _NOTHING_MORE and _readable(header):
            problems.append(Problem(refusal))
        else:
            notes.append(f"our commands do not load it: {refusal}")
    mute = _no_text(path, header.metadata) if not problems else None
    if mute is not None and TOKENIZER_JSON_KEY in header.metadata:
        problems.append(Problem(mute, False))
    elif mute is not None:
        notes.append(f"our commands need --tokenizer or --tokens: {mute}")
    return [OURS] if refusal is None else []


def _readable(header: Header) -> bool:
    return all(tensor.fact.name in _READ for tensor in header.tensors)


def _our_refusal(path: Path) -> str | None:
    """Why our programs do not load a file of a family that they know; None if they do."""
    try:
        config_from_metadata(open_gguf(path))
    except TmexportError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _no_text(path: Path, keys: dict[str, Any]) -> str | None:
    """Why our programs take no text with a file's own tokenizer; None if they do, or if it has none."""
    try:
        text = keys.get(TOKENIZER_JSON_KEY)
        if text is None and has_vocabulary(keys):
            text = vocabulary_as_json(keys, str(path))
        if text is not None:
            parse_tokenizer(text, str(path))
    except TmexportError as error:
        return str(error).removeprefix(f"{path}: ").removesuffix("; give the model's tokenizer.json with --tokenizer")
    return None


def write_fixed(path: Path, out: Path) -> int:
    """Write the file with stock types in place of another project's; what was written is read back and compared.

    Returns:
        How many tensors changed their type.

    Raises:
        TmexportError: there is nothing to fix, or a stock type cannot hold it, or it cannot be written.
    """
    if diagnose(path).fix is None:
        raise TmexportError(f"{path}: no lossless transcode to a stock type is known for it; nothing was written")
    refuse_overwriting(out, path)
    data = open_bytes(path)
    header = read_header(data)
    write_stock(out, data, header)
    check_equal(out, data, header)
    return sum(tensor.fact is Q2_0_G128 for tensor in header.tensors)
