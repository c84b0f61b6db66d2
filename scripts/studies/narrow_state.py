"""What a recurrent state in fewer bits costs, with everything else as in profile exact: texts, recall, greedy texts, long texts.

    python scripts/studies/narrow_state.py model.gguf --held-out heldout.jsonl --out narrow.json

Four parts for each format of `runtime_ref.arithmetic`: bits a token by position; bits a token of a passage that comes again after
some distance, and how many of its tokens are the likeliest; how many greedy tokens agree with those of the fp32 state; bits a
token in windows of a long stream. What stands in --out is not measured again. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from runtime_ref.arithmetic import PRESETS, Fp16, Fp32, Int8Rows, Int16, Preset, RecurrentState
from runtime_ref.gguf_source import gguf_source
from runtime_ref.model import Model
from runtime_ref.perplexity import end_of_text
from runtime_ref.sampling import log_probabilities
from runtime_ref.tokenizer import Tokenizer
from tmexport.cli.app import run_command
from tmexport.cli.progress import Bar, progress_bar
from tmexport.documents import encode_documents, read_documents
from tmexport.files import atomic_write

FORMATS: dict[str, RecurrentState] = {"fp32": Fp32(), "fp16": Fp16(), "int8": Int8Rows()}
PASSAGE, DISTANCES, TRIALS = 32, (64, 512, 4096), 8
PROMPTS, PROMPT, NEW = 8, 128, 512
WINDOW = 1024

Numbers = dict[str, Any]


def bits(model: Model, state: Any, ids: np.ndarray, bar: Bar) -> np.ndarray:
    """Bits of ids[1:], each given what the state has read and what stands before it."""
    found, at = [], 1
    for logits in model.score(state, ids[:-1].tolist()):
        found.append(-log_probabilities(logits, ids[at : at + len(logits)]) / math.log(2))
        at += len(logits)
        bar.advance(len(logits))
    return np.concatenate(found)


def by_position(model: Model, ids: np.ndarray, _tokens: int, bar: Bar) -> Numbers:
    """Mean bits a token of 16k tokens as one text, in parts that double."""
    found = bits(model, model.new_state(), ids[: 2**14 + 1], bar)
    edges = [0, *(2**n for n in range(10, 15))]
    parts = {str(high): float(found[low:high].mean()) for low, high in itertools.pairwise(edges) if low < len(found)}
    return parts | {"all": float(found.mean())}


def recall(model: Model, ids: np.ndarray, _tokens: int, bar: Bar) -> Numbers:
    """A passage, other text, the passage again: what its tokens then cost."""
    found: Numbers = {}
    for distance in DISTANCES:
        cost, hits = [], []
        for trial in range(TRIALS):
            start = trial * (len(ids) - PASSAGE - distance) // TRIALS
            passage = ids[start : start + PASSAGE]
            between = np.roll(ids, -len(ids) // 2)[start : start + distance]
            state = model.new_state()
            model.prefill(state, [*passage, *between, passage[0]])
            logits = np.concatenate(list(model.score(state, passage[1:-1].tolist())))
            cost.append(float(-log_probabilities(logits, passage[2:]).mean() / math.log(2)))
            hits.append(float((logits.argmax(1) == passage[2:]).mean()))
            bar.advance(distance)
        found[str(distance)] = {"bits_per_token": float(np.mean(cost)), "likeliest": float(np.mean(hits))}
    return found


def greedy(model: Model, ids: np.ndarray, _tokens: int, bar: Bar) -> Numbers:
    """The texts themselves; `compared` counts how far they agree."""
    texts = []
    for prompt in range(PROMPTS):
        start = prompt * (len(ids) - PROMPT) // PROMPTS
        texts.append(list(model.generate(ids[start : start + PROMPT].tolist(), NEW)))
        bar.advance(NEW)
    return {"texts": texts}


def long(model: Model, ids: np.ndarray, tokens: int, bar: Bar) -> Numbers:
    """Mean bits a token of the whole stream, and of its first and last window of 64k, read again and again from one state."""
    state, sums, done = model.new_state(), [], 0
    while done < tokens:
        part = np.take(ids, np.arange(done, done + min(WINDOW, tokens - done) + 1), mode="wrap")
        sums.append(float(bits(model, state, part, bar).mean()))
        done += len(part) - 1
    edge = max(1, min(64, len(sums) // 2))
    return {"all": float(np.mean(sums)), "first": float(np.mean(sums[:edge])), "last": float(np.mean(sums[-edge:]))}


PARTS: dict[str, tuple[Callable[[Model, np.ndarray, int, Bar], Numbers], int | None]] = {
    "by position": (by_position, 2**14),
    "recall": (recall, TRIALS * sum(DISTANCES)),
    "greedy": (greedy, PROMPTS * NEW),
    "long": (long, None),
}


def compared(done: dict[str, Numbers]) -> dict[str, Any]:
    """Differences from the fp32 state, in percent; of greedy texts the tokens until they part (at most all)."""
    result: dict[str, Any] = {}
    for name in (name for name in FORMATS if name != "fp32"):
        own: dict[str, Any] = {}
        for part in PARTS:
            have, base = done.get(f"{part}, {name}"), done.get(f"{part}, fp32")
            if have is None or base is None:
                continue
            if part == "greedy":
                own[part] = [_agreed(*pair) for pair in zip(have["texts"], base["texts"], strict=True)]
            elif part == "recall":
                own[part] = {d: _percent(v["bits_per_token"], base[d]["bits_per_token"]) for d, v in have.items()}
            else:
                own[part] = {key: _percent(value, base[key]) for key, value in have.items()}
        result[name] = own
    return result


def _percent(value: float, base: float) -> float:
    return 100 * (value / base - 1)


def _agreed(text: list[int], base: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(text, base, strict=False)) if a != b), len(base))


@click.command()
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(path_type=Path))
@click.option("--held-out", required=True, type=click.Path(path_type=Path), help="text that the model has not seen")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="results, JSON; what is there is kept")
@click.option("--tokens", default=10**6, show_default=True, help="of the long stream")
@click.option("--threads", default=1, show_default=True)
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="only these; repeatable")
def narrow_state(
    model_path: Path, held_out: Path, out: Path, tokens: int, threads: int, parts: tuple[str, ...]
) -> None:
    """Measure MODEL.gguf with states in fp32, fp16 and 8 bits."""
    done: dict[str, Numbers] = json.loads(out.read_text()) if out.exists() else {}
    source, tokenizer = gguf_source(model_path), Tokenizer.from_gguf(model_path, None)
    for name, kept_as in FORMATS.items():
        PRESETS[name] = Preset(name, Int16(), kept_as, Fp32(), "of this study")
        model = Model(source, name, threads)
        documents = encode_documents(
            list(read_documents(held_out)), tokenizer.encode_all, end_of_text(model, tokenizer), lambda n: None
        )
        ids = np.concatenate([document.ids for document in documents])
        for part in parts or PARTS:
            if f"{part}, {name}" in done:
                continue
            measure, total = PARTS[part]
            with progress_bar(f"{part}, {name}", total or tokens, unit="tokens", keep=True) as bar:
                done[f"{part}, {name}"] = measure(model, ids, tokens, bar)
            with atomic_write(out) as file:
                file.write(json.dumps(done).encode())
        model.close()
    shown = {key: value for key, value in done.items() if not key.startswith("greedy")}
    click.echo(json.dumps({"model": model_path.name, "measured": shown, "against_fp32_percent": compared(done)}))


if __name__ == "__main__":
    run_command(narrow_state, "scripts/studies/narrow_state.py")
