"""Choosing the next token from logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tmexport.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the largest logit (the lowest token id of equals); top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; expected 0 or more")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}; expected 0 (all tokens) or more")
        if not 0.0 < self.top_p <= 1.0:
            raise UsageError(f"top-p is {self.top_p}; expected above 0 and at most 1")


def log_probabilities(logits: np.ndarray, targets: Sequence[int] | np.ndarray) -> np.ndarray:
    """The log-probability of targets [n] under logits fp32 [n, vocab], in nats; fp64 [n]."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=1)
    log_total = largest + np.log(np.exp(wide - largest[:, None]).sum(axis=1))
    return wide[np.arange(len(wide)), np.asarray(targets, np.int64)] - log_total


def descending(logits: np.ndarray) -> np.ndarray:
    """Token ids from the largest to the smallest logit fp32 [vocab], the lowest id first of equals; int64.

    A sort of whole numbers (the negated logit's bits in an order that is its own, the id below them) takes a fifth of the
    time of a stable argsort of the floats.
    """
    bits = (np.float32(0) - logits).view(np.int32)  # of 0 - x, so that there is no -0.0
    keys = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(np.int64)
    return np.sort((keys << 32) | np.arange(len(logits))) & 0xFFFFFFFF


def choose(logits: np.ndarray, how: Sampling, rng: np.random.Generator) -> int:
    """The next token from logits fp32 [vocab]; probabilities in fp64."""
    if how.temperature == 0.0:
        return int(np.argmax(logits))
    order = descending(logits)
    if how.top_k:
        order = order[: how.top_k]
    below = logits[order].astype(np.float64) - np.float64(
        logits[order[0]]
    )  # subtracted first: logits / 1e-300 is infinite
    with np.errstate(over="ignore"):
        weights = np.exp(below / how.temperature)
    total = np.cumsum(weights)
    kept = 1 + int(np.searchsorted(total, how.top_p * total[-1])) if how.top_p < 1.0 else len(order)
    total = total[:kept]
    return int(order[min(int(np.searchsorted(total, rng.random() * total[-1], side="right")), kept - 1)])


class Stepping(Protocol):
    """A model that reads a prompt and then token after token, remembering them in a state of its own."""

    def new_state(self) -> Any: ...
    def prefill(self, state: Any, tokens: Sequence[int]) -> np.ndarray: ...
    def decode(self, state: Any, token: int) -> np.ndarray: ...


Take = Callable[[np.ndarray], int | None]  # from the logits after a token to the one that follows, None to end
Read = Callable[[Any, int, int, Take], int | None]  # state, token, limit, take: `speculative.Drafts.read`


def continue_tokens(
    model: Stepping,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling | None = None,
    state: Any = None,
    stop: Sequence[int] = (),
    on_logits: Callable[[np.ndarray], None] | None = None,
    read: Read | None = None,
) -> Iterator[int]:
    """Token after token; ends after `max_tokens`, or with a token of `stop` (which is yielded).

    Args:
        model: reads the tokens.
        prompt: token ids, at least one.
        max_tokens: the most tokens to yield.
        sampling: how to choose; greedy if None.
        state: continue from here (it is updated, by all tokens but the last; perhaps by several before the first of them is
            yielded); a new state if None.
        stop: ids that end the text.
        on_logits: called with the logits each token was chosen from.
        read: reads the next token, and may read several; one at a time if None.
    """
    how = sampling or Sampling()
    state = state or model.new_state()
    rng, made = np.random.default_rng(how.seed), list[int]()

    def take(logits: np.ndarray) -> int | None:
        if on_logits:
            on_logits(logits)
        made.append(choose(logits, how, rng))
        return None if made[-1] in stop or len(made) == max_tokens else made[-1]

    logits = model.prefill(state, prompt)
    following, shown = take(logits) if max_tokens > 0 else None, 0
    while True:
        yield from made[shown:]
        shown = len(made)
        if following is None:
            return
        limit = max_tokens - shown - 1
        following = read(state, following, limit, take) if read else take(model.decode(state, following))
