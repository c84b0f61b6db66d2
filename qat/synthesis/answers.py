"""A teacher's answers to prompts as training text; a run that was interrupted goes on where it was, to the same text."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from tokenizers import Tokenizer

from qat.data import load_tokenizer
from qat.evaluate import find_tokenizer
from qat.model import LanguageModel, load_model
from qat.synthesis.drawing import continue_prompts
from tmexport.chat_template import ChatTemplate
from tmexport.errors import TextError, UsageError
from tmexport.files import atomic_write
from tmexport.tokenizer.beside import read_beside

_BEGINS = b'{"made_of": "'  # how OUT.part does, which a power cut may have left with no whole line


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. most: tokens of prompt and answer together; seed: of the whole run; at_once: prompts a batch."""

    most: int
    temperature: float
    seed: int
    at_once: int

    def seed_of(self, batch: int) -> int:
        """Of the batch of this number: each is drawn by itself, so that a run can be cut between them."""
        return self.seed + batch


@dataclass(frozen=True)
class Writer:
    """A teacher that answers. template: how it is spoken to; None: prompts are continued as they are."""

    model: LanguageModel
    tokenizer: Tokenizer
    ends: frozenset[int]
    template: ChatTemplate | None

    def ids(self, prompt: str) -> list[int]:
        """The tokens that the model reads: the prompt as its template writes a question, up to where the answer begins."""
        text = prompt if self.template is None else self.template.render([{"role": "user", "content": prompt}])
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def answer(self, prompts: Sequence[str], drawing: Drawing, batch: int) -> Iterator[dict[str, Any]]:
        """A line a prompt; one that leaves less than half of the tokens for its answer is passed over."""
        device = self.model.head_weight.device
        read = [(prompt, ids) for prompt in prompts if 0 < len(ids := self.ids(prompt)) <= drawing.most // 2]
        if not read:
            return
        seed = drawing.seed_of(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            said = continue_prompts(
                self.model, [ids for _, ids in read], self.ends, drawing.most, drawing.temperature, seed
            )
        for (prompt, asked), ids in zip(read, said, strict=True):
            yield {
                "text": self.tokenizer.decode(ids, skip_special_tokens=False),
                "prompt": prompt,
                "seed": seed,
                "tokens": len(ids) - len(asked),
            }


def load_writer(folder: Path, tokenizer: Path | None, raw: bool) -> Writer:
    """The model of a checkpoint folder, on a GPU if there is one, with its chat template and the tokenizer given or its own.

    Raises:
        UsageError: it has no template, and `raw` is not set.
        TmexportError: it cannot be read.
    """
    path = find_tokenizer(folder, tokenizer)
    beside = read_beside(folder, path.parent)
    template = None
    if not raw:
        source = beside.templates.get("")
        if source is None:
            raise UsageError(f"{folder}: has no chat template; add --raw to continue the prompts as they are")
        template = ChatTemplate(source, {"bos_token": beside.bos or "", "eos_token": beside.eos or ""}, str(folder))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder).requires_grad_(False).to(device)
    return Writer(model, load_tokenizer(path, model.vocab_size), frozenset(beside.ends), template)


def synthesize(
    writer: Writer, prompts: Sequence[str], drawing: Drawing, out: Path, on_batch: Callable[[int], None]
) -> dict[str, Any]:
    """Write OUT, JSON Lines with the text, the prompt, the seed and the tokens of each answer.

    Until all are written they are in OUT.part, which the same call goes on with; its first line says what made it.

    Args:
        prompts: texts, in order.
        on_batch: called with the number of prompts of a batch that is done.

    Returns: answers, tokens (those of the answers alone), passed_over (prompts that are too long or empty).

    Raises:
        UsageError: OUT is there, or OUT.part is of other prompts, another model or another drawing.
    """
    if out.exists():
        raise UsageError(f"{out}: is there already; remove it, or choose another --out")
    part = out.with_name(out.name + ".part")
    made_of = _digest(writer, prompts, drawing)
    found = _read_part(part, made_of)
    written = found or []
    answers, tokens = sum(len(lines) for lines in written), sum(line["tokens"] for lines in written for line in lines)
    with open(part, "a", encoding="utf-8") as file:
        if found is None:
            _append(file, {"made_of": made_of})
        for batch, first in enumerate(range(0, len(prompts), drawing.at_once)):
            asked = prompts[first : first + drawing.at_once]
            if batch < len(written):
                on_batch(len(asked))
                continue
            lines = list(writer.answer(asked, drawing, batch))
            _append(file, {"batch": batch, "lines": lines})
            answers, tokens = answers + len(lines), tokens + sum(line["tokens"] for line in lines)
            on_batch(len(asked))
    if not answers:
        part.unlink()
        raise TextError(f"no prompt has between 1 and {drawing.most // 2} tokens; raise --max-tokens, or shorten them")
    _finish(part, out)
    return {"answers": answers, "tokens": tokens, "passed_over": len(prompts) - answers}


def _digest(writer: Writer, prompts: Sequence[str], drawing: Drawing) -> str:
    """Of all that decides the text."""
    digest = hashlib.blake2b(repr((drawing, list(prompts), sorted(writer.ends))).encode(), digest_size=16)
    digest.update(repr([writer.ids(prompt) for prompt in prompts[:1]]).encode())  # of the template
    for name, tensor in writer.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _append(file: TextIO, line: dict[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _read_part(part: Path, made_of: str) -> list[list[dict[str, Any]]] | None:
    """The lines of each batch that an interrupted run wrote; None if it wrote nothing. A line that was cut off is removed.

    Raises:
        UsageError: the file is another run's, and stays as it is.
    """
    whole = part.read_bytes() if part.is_file() else b""
    complete = whole[: whole.rfind(b"\n") + 1]
    if not complete and whole[: len(_BEGINS)] == _BEGINS[: len(whole)]:
        part.unlink(missing_ok=True)
        return None
    try:
        header, *batches = [json.loads(line) for line in complete.splitlines()]
        if header["made_of"] == made_of:
            os.truncate(part, len(complete))
            return [batch["lines"] for batch in batches]
    except (ValueError, KeyError, TypeError):
        pass
    raise UsageError(f"{part}: holds the answers of another run; remove it, or choose another --out")


def _finish(part: Path, out: Path) -> None:
    with atomic_write(out) as file, open(part, encoding="utf-8") as lines:
        for batch in list(lines)[1:]:
            for line in json.loads(batch)["lines"]:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    part.unlink()
