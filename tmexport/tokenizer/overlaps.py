"""Added tokens that overlap in a text: the tokenizers library takes the leftmost, llama.cpp the longest of all first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Overlap:
    """A text in which two added tokens overlap, and the one that each program takes first."""

    first: str
    second: str
    text: str
    ours: str
    theirs: str


def overlapping(added: list[dict[str, Any]]) -> Overlap | None:
    """Two added tokens that the programs can take differently, with a text that shows it; None if there are none.

    The library looks for tokens that are not `normalized` first, each time for the leftmost and there the longest; llama.cpp
    for one token after another, the longest (in bytes) first. Tokens of one repeated character cannot differ.
    """
    tokens = {entry["content"]: bool(entry.get("normalized", not entry.get("special"))) for entry in added}
    starts: dict[str, list[str]] = {}
    for token in tokens:
        for end in range(1, len(token)):
            starts.setdefault(token[:end], []).append(token)
    for left in tokens:
        for start in range(1, len(left)):
            for right in starts.get(left[start:], ()):
                text = left + right[len(left) - start :]
                found = _taken(left, right, text, tokens)
                if found is not None:
                    return found
    return _nested(tokens)


def _nested(tokens: dict[str, bool]) -> Overlap | None:
    """A token inside another that the library looks for later."""
    early, late = ([t for t, normalized in tokens.items() if normalized is which] for which in (False, True))
    for outer in late:
        for inner in early:
            if inner != outer and inner in outer:
                return Overlap(inner, outer, outer, inner, outer)
    return None


def _taken(left: str, right: str, text: str, tokens: dict[str, bool]) -> Overlap | None:
    if left == right or len(set(left)) == len(set(right)) == len(set(text)) == 1:
        return None
    ours = left if tokens[left] <= tokens[right] else right  # False, not normalized, is first
    size = {token: len(token.encode("utf-8", "replace")) for token in (left, right)}
    theirs = left if size[left] > size[right] else right
    if size[left] == size[right]:  # in no order: it may be either
        theirs = right if ours == left else left
    return None if ours == theirs else Overlap(left, right, text, ours, theirs)
