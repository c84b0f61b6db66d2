"""Answers of a given form: a JSON schema or a grammar decides which tokens may come next (llguidance).

It fails closed: a schema or a grammar that is not fully understood is refused, and a text that gets out of step with it
ends with an error, never as free text.
"""

from __future__ import annotations

import json
from typing import Any

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask

from runtime_ref.serve.fields import BadRequest
from runtime_ref.serve.vocabulary import Vocabulary
from tmexport.errors import TmexportError

ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarError(TmexportError):
    """A text left its grammar."""


class Grammars:
    """Compiles grammars for one tokenizer."""

    def __init__(self, vocabulary: Vocabulary, ends: tuple[int, ...]) -> None:
        """`ends`: the tokens that end a text, at least one."""
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Known(vocabulary, ends)), n_vocab=vocabulary.size, eos_token=list(ends)
        )
        self._size = vocabulary.size

    def json(self, schema: dict[str, Any]) -> Constraint:
        """Text that a JSON schema allows.

        Raises:
            BadRequest: the schema is wrong, or has a part that llguidance does not do.
        """
        try:
            return self._compile(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema)), "the JSON schema")
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the JSON schema cannot be used: {error}", field="response_format") from None

    def text(self, grammar: str) -> Constraint:
        """Text of a grammar in Lark's notation (llguidance's dialect) or in GBNF (llama.cpp's).

        Raises:
            BadRequest: it is no such grammar.
        """
        try:
            lark = any_to_lark(grammar)
        except Exception as error:  # the converter has no error type of its own for everything
            raise BadRequest(f"the grammar cannot be used: {error}", field="grammar") from None
        return self._compile(llguidance.LLMatcher.grammar_from_lark(lark), "the grammar")

    def _compile(self, grammar: str, what: str) -> Constraint:
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, self._tokenizer)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if failed or messages or matcher.is_error():
            reason = messages[0] if messages else matcher.get_error()
            raise BadRequest(f"{what} cannot be used: {reason.splitlines()[0] if reason else 'unknown'}")
        return Constraint(matcher, self._size)


class Constraint:
    """Where one text is in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int) -> None:
        self._matcher, self._size = matcher, size
        self._mask = allocate_token_bitmask(1, size)

    def copy(self) -> Constraint:
        """The same place, for another text."""
        return Constraint(self._matcher.deep_copy(), self._size)

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits fp32 [vocab] in which what may not come is -inf.

        Raises:
            GrammarError: nothing may come.
        """
        fill_next_token_bitmask(self._matcher, self._mask)
        allowed = logits.copy()
        apply_token_bitmask_inplace(allowed, self._mask)
        if self._matcher.is_error() or not np.isfinite(allowed).any():
            raise GrammarError(f"no token continues the text: {self._matcher.get_error() or 'the grammar has ended'}")
        return allowed

    def take(self, token: int) -> None:
        """Go on by one token.

        Raises:
            GrammarError: the grammar does not have it here.
        """
        if not self._matcher.consume_token(token):
            raise GrammarError(f"the grammar does not have the token {token} here: {self._matcher.get_error()}")

    @property
    def complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()


class _Known:
    """What llguidance asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary, ends: tuple[int, ...]) -> None:
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.tokens, self.special_token_ids = vocabulary.pieces, sorted({*vocabulary.special, *ends})
        self._tokenizer = vocabulary.tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)
