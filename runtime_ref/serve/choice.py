"""One text that is being made: which token comes next, which text may be shown, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from runtime_ref.sampling import Sampling, choose
from runtime_ref.serve.vocabulary import Vocabulary

if TYPE_CHECKING:
    from runtime_ref.serve.grammar import Constraint

Top = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability in nats, and the likeliest tokens there; both None for the first of a text."""

    token: int
    logprob: float | None
    top: Top | None


@dataclass(frozen=True)
class Piece:
    """More of the text of choice `index`, and the tokens it is made of where log-probabilities are asked for."""

    index: int
    text: str
    scored: tuple[Scored, ...]


@dataclass(frozen=True)
class Finished:
    """Choice `index` is whole. reason: stop or length; tokens: how many were made."""

    index: int
    reason: str
    tokens: int


def score(logits: np.ndarray, targets: Sequence[int], top: int) -> list[Scored]:
    """The log-probabilities of targets [n] under logits fp32 [n, vocab], with the `top` likeliest of each position."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=1)
    wide -= (largest + np.log(np.exp(wide - largest[:, None]).sum(axis=1)))[:, None]
    found = []
    for row, target in zip(wide, targets, strict=True):
        likeliest = _largest(row, top)
        found.append(Scored(int(target), float(row[target]), tuple((int(i), float(row[i])) for i in likeliest)))
    return found


def _largest(row: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest of fp64 [vocab], the largest first, the lowest first of equals."""
    if not count:
        return np.zeros(0, np.int64)
    least = np.partition(row, -count)[-count] if count < len(row) else -np.inf
    places = np.flatnonzero(row >= least)
    return places[np.argsort(-row[places], kind="stable")][:count]


class StopTexts:
    """Holds back what may be the beginning of a stop text."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held, self.found = stops, "", False

    def push(self, text: str) -> tuple[str, bool]:
        """What may be shown now, and whether a stop text has come; it and what follows are never shown."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.found = True
            return self._held[: min(found)], True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown, False

    def _overlap(self, stop: str) -> int:
        """How many characters at the end begin `stop`."""
        return next((n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0)

    def flush(self) -> str:
        """What is left when the text has ended otherwise."""
        held, self._held = self._held, ""
        return held


class Choice:
    """The text with number `index` of a request."""

    def __init__(
        self,
        index: int,
        vocabulary: Vocabulary,
        sampling: Sampling,
        ends: tuple[int, ...],
        max_tokens: int,
        stops: tuple[str, ...] = (),
        top: int | None = None,
        draw: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        """Ready for its first logits.

        Args:
            index: in the answer.
            vocabulary: the model's.
            sampling: how to choose.
            ends: tokens that end the text.
            max_tokens: after which it ends as well.
            stops: texts that end it.
            top: how many likeliest tokens to report with each; None reports nothing.
            draw: number among the choices of one prompt: 0 draws as `generate` with the same seed does.
            constraint: the grammar it must keep to.
        """
        self.index, self.tokens, self.reason = index, list[int](), ""
        self._sampling, self._ends, self._max, self._top = sampling, ends, max_tokens, top
        self._rng = np.random.default_rng([sampling.seed, draw] if draw else sampling.seed)
        self._stream, self._stops, self._constraint = vocabulary.tokenizer.stream(), StopTexts(stops), constraint
        self._pending: list[Scored] = []
        if not max_tokens:
            self.reason = "length"

    @property
    def left(self) -> int:
        """The most tokens that may still come."""
        return self._max - len(self.tokens)

    def step(self, logits: np.ndarray) -> Piece | None:
        """Choose a token from logits fp32 [vocab]; text that became complete, if any. `reason` says if it was the last.

        Raises:
            GrammarError: no token continues the text.
        """
        allowed = logits if self._constraint is None else self._constraint.allow(logits)
        token = choose(allowed, self._sampling, self._rng)
        self.tokens.append(token)
        if self._top is not None:
            self._pending += score(logits[None], [token], self._top)
        text, stopped = "", token in self._ends
        if not stopped:
            text, stopped = self._stops.push(self._stream.push(token))
        if self._constraint is not None:
            self._constraint.take(token)
            stopped = stopped or self._constraint.complete
        if stopped or len(self.tokens) >= self._max:
            return self.end("stop" if stopped else "length", text)
        return self._piece(text)

    def end(self, reason: str, text: str = "") -> Piece | None:
        """The last piece of a text that ends for this reason; `text` goes before what is held back."""
        self.reason = reason
        if self._stops.found:
            return self._piece(text)
        rest, stopped = self._stops.push(self._stream.flush())
        if stopped:
            self.reason = "stop"
        return self._piece(text + rest + ("" if stopped else self._stops.flush()))

    def _piece(self, text: str) -> Piece | None:
        if not text and not (self.reason and self._pending):
            return None
        scored, self._pending = tuple(self._pending), []
        return Piece(self.index, text, scored)
