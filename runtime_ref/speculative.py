"""Drafts of the next tokens from the text itself, for `Model.advance`, which reads several at once and keeps those that are right.

A draft is what followed the last place where the text ran as it does now, and goes on behind a token that is another one there,
as a number in a record. Whether it pays is known before anything is spent: every token that is made, by whatever way, also tells
if the text's own past foresaw it, by the length of the match and by whether the token that it repeats was foreseen itself (the
numbers of a record were not, the last time either); and what a pass over so many tokens takes is measured. Text that its past
does not foresee is decoded token by token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from runtime_ref.sampling import Take

MOST = 16  # tokens of a pass: with more, each costs hardly less
_SIZES = (2, 4, 8, MOST)
_NEW, _RIGHT, _WRONG = range(3)  # how a token came: nothing was foreseen, or it was, or another one
_GRAM = 3  # tokens that must be alike before anything is foreseen
_LONGEST = 16  # further ones say no more
_OTHERS = 4  # tokens that may be others, one after the other, before the place is given up
_MEMORY = 32.0  # observations of a length of match that count
# how often a token comes again, by how it came and by the length of match, as long as nothing was observed
_HOPES = tuple([rise * (n + more) / (n + 4) for n in range(_LONGEST + 1)] for rise, more in ((1, 0), (1, 2), (0.5, 0)))
_GAIN = 1.1  # times as fast as a token at a time a draft must promise to be
_PASSES, _KNOWN = 8, 3  # of each size: whose times count, and how many there must be
_STALE = 1000  # passes of other sizes after which a size is tried again: something may have disturbed it


class Costs:
    """What a pass over so many tokens takes, relative to one token, as measured."""

    def __init__(self) -> None:
        self._one: deque[float] = deque(maxlen=_PASSES)  # seconds
        self._more: dict[int, deque[float]] = {}
        self._passes, self._last = 0, dict[int, int]()

    @contextmanager
    def measured(self, tokens: int) -> Iterator[None]:
        """Around such a pass."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self._passes += 1
        self._last[tokens] = self._passes
        if tokens == 1:
            self._one.append(took)
        elif tokens not in self._more:  # the first of a size may compile, and does not count
            self._more[tokens] = deque(maxlen=_PASSES)
        elif self._one:
            self._more[tokens].append(took / min(self._one))

    def of(self, tokens: int) -> float:
        """At best; a size that is hardly known, or was not tried for long, is taken to be cheap, and so will be."""
        if not self._one:  # a text whose every token is foreseen would never tell what one costs
            return float("inf")
        some = self._more.get(tokens, ())
        if len(some) < _KNOWN or self._passes - self._last[tokens] > _STALE:
            return 1.0 + 0.15 * (tokens - 1)
        return min(some)


class Lookup:
    """A text, and the place in it whose continuation is foreseen. length: of the match before that place, 0 for none; behind
    a token that was another one there it begins with 1.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._text: list[int] = []
        self._came: list[int] = []  # of each token
        self._after: dict[tuple[int, ...], int] = {}  # the last place behind so many tokens
        self._at = self.length = self._others = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> bool | None:
        """One more token; whether it was foreseen, None if nothing was."""
        right = self._text[self._at] == token if self.length else None
        self._at += 1
        self._others = self._others + 1 if right is False else 0
        self.length = self.length + 1 if right else 1 if 0 < self._others <= _OTHERS else 0
        self._text.append(token)
        self._came.append(_NEW if right is None else _RIGHT if right else _WRONG)
        if len(self._text) >= _GRAM:
            gram = tuple(self._text[-_GRAM:])
            if self.length < _LONGEST and gram in self._after:
                self._consider(self._after[gram])
            self._after[gram] = len(self._text)
        return right

    def _consider(self, place: int) -> None:
        """The later of two places, if its match is as long."""
        length, end = _GRAM, len(self._text)
        while length < min(_LONGEST, place) and self._text[place - length - 1] == self._text[end - length - 1]:
            length += 1
        if length >= self.length:
            self._at, self.length = place, length

    def draft(self, count: int) -> list[int]:
        """The tokens foreseen; where the match ends with the text, it is taken to go round."""
        return self._following(self._text, count)

    def came(self, count: int) -> list[int]:
        """How the tokens came that such a draft repeats."""
        return self._following(self._came, count)

    def _following(self, kept: list[int], count: int) -> list[int]:
        found = kept[self._at : self._at + count] if self.length else []
        while found and len(found) < count:
            found.append(found[len(found) - (len(kept) - self._at)])
        return found


class Reader(Protocol):
    """A model that reads several tokens at once (`Model`)."""

    def decode(self, state: Any, token: int) -> np.ndarray: ...
    def advance(self, state: Any, token: int, draft: Sequence[int], take: Take) -> int | None: ...


class Drafts:
    """What may follow a text, as far as it is worth a try; and reading on in it (`sampling.Read`)."""

    def __init__(self, model: Reader, costs: Costs, tokens: Sequence[int]) -> None:
        """For a text of which the model will have read these tokens."""
        self._model, self._costs, self._lookup = model, costs, Lookup(tokens)
        # by how the token came that is foreseen again, and by the length of match: how often it came, of how often
        self._right = [[2.0 * hope for hope in hopes] for hopes in _HOPES]
        self._seen = [[2.0] * len(hopes) for hopes in _HOPES]

    def read(self, state: Any, token: int, limit: int, take: Take) -> int | None:
        """Read the text's next token, and what was foreseen of the at most `limit` tokens after it."""
        self.note(token)
        draft, chosen = self._propose(limit), None

        def taken(logits: np.ndarray) -> int | None:
            nonlocal chosen
            if chosen is not None:  # it has been read
                self.note(chosen)
            chosen = take(logits)
            return chosen

        with self._costs.measured(1 + len(draft)):
            return self._model.advance(state, token, draft, taken) if draft else take(self._model.decode(state, token))

    def note(self, token: int) -> None:
        """The text's next token, where it is read in another way."""
        length = min(self._lookup.length, _LONGEST)
        came = self._lookup.came(1)
        right = self._lookup.push(token)
        for kind in came:
            fade = min(1.0, _MEMORY / (self._seen[kind][length] + 1.0))
            self._right[kind][length] = (self._right[kind][length] + bool(right)) * fade
            self._seen[kind][length] = (self._seen[kind][length] + 1.0) * fade

    def _propose(self, limit: int) -> list[int]:
        """At most `limit` tokens to try behind the text's last, or none."""
        length = self._lookup.length
        if not length:
            return []
        best, count, reached, expected = _GAIN, 0, 1.0, 1.0
        for size, kind in enumerate(self._lookup.came(min(MOST - 1, limit)), 2):
            at = min(length + size - 2, _LONGEST)
            reached *= self._right[kind][at] / self._seen[kind][at]
            expected += reached
            if size in _SIZES and expected / self._costs.of(size) > best:
                best, count = expected / self._costs.of(size), size - 1
        return self._lookup.draft(count)
