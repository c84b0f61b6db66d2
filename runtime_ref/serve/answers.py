"""Events of choices as OpenAI's JSON: one object, or the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from runtime_ref.serve.bodies import Asked
from runtime_ref.serve.choice import Finished, Piece, Scored
from runtime_ref.serve.scheduler import Read
from runtime_ref.serve.vocabulary import Vocabulary


@dataclass
class _Text:
    """One choice of the answer so far. echo: the prompt, where it is repeated."""

    parts: list[str] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    reason: str | None = None
    length: int = 0  # characters whose tokens have been written


class Answer:
    """Collects the events of a request's works; choice k of prompt p is choice p * n + k of the answer."""

    def __init__(self, asked: Asked, model: str, vocabulary: Vocabulary) -> None:
        self._asked, self._vocabulary = asked, vocabulary
        self._texts = [_Text() for _ in range(len(asked.prompts) * asked.n)]
        self._made = self._cached = 0
        kind = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind + (".chunk" if asked.chat and asked.stream else ""),
            "created": int(time.time()),
            "model": model,
        }

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return all(text.reason for text in self._texts)

    def take(self, prompt: int, event: Read | Piece | Finished) -> Iterator[dict[str, Any]]:
        """Add an event of work number `prompt`; the chunks that a stream sends for it."""
        if isinstance(event, Read):
            self._cached += event.cached
            yield from self._begin(prompt, event)
        elif isinstance(event, Piece):
            yield self._more(event.index, event.text, event.scored)
        else:
            self._made += event.tokens
            self._texts[event.index].reason = event.reason
            yield self._chunk(event.index, "", (), event.reason)

    def _begin(self, prompt: int, event: Read) -> Iterator[dict[str, Any]]:
        for index in range(prompt * self._asked.n, (prompt + 1) * self._asked.n):
            if self._asked.echo:
                yield self._more(index, self._vocabulary.tokenizer.decode(self._asked.prompts[prompt]), event.scored)
            elif self._asked.chat:
                yield self._chunk(index, "", (), None, {"role": "assistant"})

    def _more(self, index: int, text: str, scored: tuple[Scored, ...]) -> dict[str, Any]:
        chunk = self._chunk(index, text, scored, None)
        self._texts[index].parts.append(text)
        self._texts[index].scored += scored
        return chunk

    def _chunk(
        self, index: int, text: str, scored: tuple[Scored, ...], reason: str | None, extra: dict[str, str] | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if self._asked.chat:
            choice["delta"] = (extra or {}) | ({"content": text} if text or extra else {})
        else:
            choice["text"] = text
        if self._asked.top is not None and scored:
            choice["logprobs"] = self._logprobs(self._texts[index], scored)
        return {**self._head, "choices": [choice]}

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = []
        for index, text in enumerate(self._texts):
            choice: dict[str, Any] = {"index": index, "finish_reason": text.reason, "logprobs": None}
            if self._asked.top is not None:
                text.length = 0
                choice["logprobs"] = self._logprobs(text, tuple(text.scored))
            if self._asked.chat:
                choice["message"] = {"role": "assistant", "content": "".join(text.parts), "refusal": None}
            else:
                choice["text"] = "".join(text.parts)
            choices.append(choice)
        return {**self._head, "choices": choices, "usage": self.usage()}

    def last_chunk(self) -> dict[str, Any]:
        """The chunk with the numbers of tokens."""
        return {**self._head, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens; cached_tokens of the prompts were not computed again."""
        prompt = sum(map(len, self._asked.prompts))
        return {
            "prompt_tokens": prompt, "completion_tokens": self._made, "total_tokens": prompt + self._made,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }  # fmt: skip

    def _logprobs(self, text: _Text, scored: tuple[Scored, ...]) -> dict[str, Any]:
        return {"content": [self._for_chat(s) for s in scored], "refusal": None} if self._asked.chat else self._for_completion(text, scored)  # fmt: skip

    def _for_chat(self, scored: Scored) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in scored.top or ()]
        return self._named(scored.token, scored.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._vocabulary.name(token),
            "logprob": logprob,
            "bytes": list(self._vocabulary.pieces[token]),
        }

    def _for_completion(self, text: _Text, scored: tuple[Scored, ...]) -> dict[str, Any]:
        name, offsets = self._vocabulary.name, []
        for s in scored:
            offsets.append(text.length)
            if s.token not in self._vocabulary.special:
                text.length += len(self._vocabulary.pieces[s.token].decode(errors="ignore"))
        tops = [None if s.top is None else _top(s, name) for s in scored]
        return {
            "tokens": [name(s.token) for s in scored], "token_logprobs": [s.logprob for s in scored],
            "top_logprobs": tops, "text_offset": offsets,
        }  # fmt: skip


def _top(scored: Scored, name: Any) -> dict[str, float | None]:
    """The likeliest tokens by name, and the one that is there."""
    return {name(token): logprob for token, logprob in (*(scored.top or ()), (scored.token, scored.logprob))}
