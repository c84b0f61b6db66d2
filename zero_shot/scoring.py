"""Log-likelihoods of continuations, each context read once whatever the number of its continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tmexport.errors import UsageError
from zero_shot.tasks import Example

Likelihood = tuple[float, bool]  # nats (at most 0), and whether greedy decoding would say exactly this


class Scorer(Protocol):
    """A model with its tokenizer."""

    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """Token ids, nothing added."""
        ...

    def likelihoods(self, context: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        """Of each continuation (at least one token) after the context (at least one token)."""
        ...

    def rolling(self, tokens: list[int]) -> float:
        """The log-likelihood of a whole text after an end-of-text token."""
        ...


def encode_pair(model: Scorer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of the context and of the continuation, divided as lm-eval does.

    Both are encoded together and divided after as many tokens as the context has alone; spaces that end the context go to
    the continuation; an empty context becomes the end-of-text token.

    Raises:
        UsageError: the continuation has no token of its own.
    """
    if not context:
        whole = [model.end_of_text, *model.encode(continuation)]
        number = 1
        if whole[1:2] == whole[:1]:
            whole = whole[1:]
    else:
        number = len(model.encode(context.rstrip()))
        whole = model.encode(context + continuation)
    if not 0 < number < len(whole):
        raise UsageError(f"{continuation!r} adds no token to {context!r}; nothing can be scored")
    return whole[:number], whole[number:]


def score(
    model: Scorer,
    requests: Sequence[tuple[list[int], list[int]]],
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[Likelihood]:
    """The likelihood of each (context, continuation) pair of token ids; `on_progress` gets the number of pairs done."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(index)
    results: list[Likelihood] = [(0.0, False)] * len(requests)
    for shared, members in groups.items():
        found = model.likelihoods(list(shared), [requests[i][1] for i in members])
        for index, likelihood in zip(members, found, strict=True):
            results[index] = likelihood
        on_progress(len(members))
    return results


def score_examples(
    model: Scorer, examples: Sequence[Example], on_progress: Callable[[int], None] = lambda n: None
) -> list[list[Likelihood]]:
    """The likelihoods of each example's requests, in their order."""
    pairs = [zip(e.contexts, e.continuations, strict=True) for e in examples]
    requests = [encode_pair(model, *pair) for example in pairs for pair in example]
    found = iter(score(model, requests, on_progress))
    return [[next(found) for _ in e.contexts] for e in examples]
