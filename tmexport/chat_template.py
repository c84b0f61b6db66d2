"""The chat template of a file: messages in, the text that the model reads out.

A template is a small program (jinja2) that comes with a stranger's model. It runs in jinja2's sandbox, and what it may
compute is bounded: text by length, time by a deadline, powers and repetitions by size.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tmexport.documents import read_text
from tmexport.errors import TextError, TmexportError, UsageError
from tmexport.gguf.reader import GGUFFile, open_gguf

TEMPLATE_KEY = "tokenizer.chat_template"
_LONGEST = 16_000_000  # characters of a rendered conversation
_SECONDS = 5.0
_LARGEST = 1_000_000  # of a product or a power of numbers that a template needs (loop counters)
_WIDE = re.compile(r"\d{7}|%[^a-zA-Z%]*\*")  # a width in a format

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled template and the special tokens it may name."""

    def __init__(self, source: str, tokens: Mapping[str, str], where: str) -> None:
        """Compile.

        Args:
            source: the jinja2 text.
            tokens: bos_token and eos_token, as text.
            where: the file it is from, for messages.

        Raises:
            TmexportError: it is no valid template.
        """
        self._where, self._tokens = where, dict(tokens)
        self._environment = _environment()
        try:
            self._template = _compile(self._environment, source)
        except _DamagedError as error:
            raise TmexportError(f"{where}: the chat template is damaged: {error}") from None

    @classmethod
    def from_gguf(cls, file: GGUFFile, given: str | None = None) -> ChatTemplate | None:
        """The template `given`, or that of the file; None if it has none."""
        source = file.metadata.get(TEMPLATE_KEY) if given is None else given
        if not isinstance(source, str):
            return None
        texts = file.metadata.get("tokenizer.ggml.tokens", ())
        tokens = {}
        for name in ("bos", "eos"):
            index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
            tokens[f"{name}_token"] = texts[index] if type(index) is int and 0 <= index < len(texts) else ""
        return cls(source, tokens, str(file.path))

    def render(self, messages: Sequence[Message], answer: bool = True) -> str:
        """The text of a conversation; `answer`: followed by what begins the assistant's answer.

        Raises:
            TextError: the template refuses these messages, or makes too much of them.
        """
        self._environment.deadline = time.monotonic() + _SECONDS
        parts, length = [], 0
        try:
            for part in self._template.generate(
                messages=[dict(m) for m in messages],
                add_generation_prompt=answer,
                tools=None,
                documents=None,
                **self._tokens,
            ):
                self._environment.check_time()
                length += len(part)
                if length > _LONGEST:
                    raise TextError(f"the chat template makes more than {_LONGEST} characters of these messages")
                parts.append(part)
        except TmexportError:
            raise
        except Exception as error:  # whatever a stranger's template does is its own fault, or that of the messages
            raise TextError(f"the chat template refuses these messages: {_reason(error)}") from None
        return "".join(parts)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks the answers for training in transformers; the text is what stands in it."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares a set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, which keeps templates from our objects; here also from memory and time."""

    intercepted_binops = frozenset(["*", "**", "%"])
    deadline = float("inf")

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TextError(f"the chat template takes longer than {_SECONDS:.0f} s")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str) and _WIDE.search(left):
                raise TextError("the chat template computes % of too large values")
            return super().call_binop(context, operator, left, right)
        sizes = [abs(v) if isinstance(v, int | float) else len(v) for v in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > _LARGEST:
            raise TextError(f"the chat template computes {operator} of too large values")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_time()
        found = super().getattr(obj, attribute)
        if isinstance(found, str) and len(found) > _LONGEST:  # a text that is doubled in a loop
            raise TextError(f"the chat template makes more than {_LONGEST} characters of these messages")
        return found

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_time()
        return super().getitem(obj, argument)

    def call(self, context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_time()
        if isinstance(getattr(called, "__self__", None), str):  # 'x'.center(1000000000)
            self.check_sizes(*args, *kwargs.values())
        return super().call(context, called, *args, **kwargs)

    def check_sizes(self, *values: Any) -> None:
        if any(isinstance(value, int) and value > _LARGEST for value in values):
            raise TextError(f"the chat template asks for something of a size above {_LARGEST}")


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is computed when the text is made, never while the template is compiled, and of small sizes only."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @functools.wraps(function)
    def bounded(context: Any, *args: Any, **kwargs: Any) -> Any:
        context.environment.check_time()
        context.environment.check_sizes(*args[1:], *kwargs.values())
        first = {"context": [context], "eval_context": [context.eval_ctx], "environment": [context.environment]}
        return function(*first.get(wants, []), *args, **kwargs)

    return pass_context(bounded)  # jinja2 folds no filter that wants the context


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    for name in set(environment.filters) - {"default", "d"}:  # whose argument is a value, not a size
        environment.filters[name] = _bounded(environment.filters[name])
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


class _DamagedError(Exception):
    """A text is no template; the message says why."""


def _compile(environment: _Sandbox, source: str) -> Template:
    """jinja2 compiles by way of Python, and lets Python's own errors out beside its own."""
    try:
        return environment.from_string(source)
    except Exception as error:
        raise _DamagedError(_reason(error)) from None


def template_fault(source: str) -> str | None:
    """Why a text is no template; None if it is one."""
    try:
        _compile(_environment(), source)
    except _DamagedError as error:
        return str(error)
    return None


def load_template(model_path: Path, given: Path | None) -> ChatTemplate | None:
    """The chat template in a file of its own, or the GGUF's; None if there is none.

    Raises:
        TmexportError: it cannot be read, or is no valid template.
    """
    return ChatTemplate.from_gguf(open_gguf(model_path), None if given is None else read_text(given))


def needed_template(model_path: Path, given: Path | None) -> ChatTemplate:
    """`load_template`, where there must be one.

    Raises:
        UsageError: there is none.
        TmexportError: as `load_template`.
    """
    template = load_template(model_path, given)
    if template is None:
        raise UsageError(f"{model_path}: has no chat template; give one with --chat-template FILE")
    return template


def chat_tokens(
    template: ChatTemplate, encode: Callable[[str], list[int]], messages: Sequence[Message]
) -> tuple[list[int], tuple[int, ...]]:
    """The token ids of a conversation up to the answer, and how many of them end at a message worth a snapshot.

    These are the first message (a system prompt that many conversations share) and the last but one (what the next turn
    still begins with, whatever becomes of the answer). A template that does not build a conversation from its parts in
    order gives no boundaries.

    Raises:
        UsageError: the template refuses the messages.
    """
    ids = encode(template.render(messages))
    found = set()
    for count in {1, len(messages) - 1} - {0, len(messages)}:
        try:
            part = encode(template.render(messages[:count], answer=False))
        except UsageError:
            continue
        same = next((i for i, (a, b) in enumerate(zip(part, ids, strict=False)) if a != b), min(len(part), len(ids)))
        found.add(same)
    return ids, tuple(sorted(found - {0, len(ids)}))


def _refuse(message: object) -> NoReturn:
    raise TextError(f"the chat template refuses these messages: {message}")


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """With transformers' parameters, in its order."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if text else ''}{text}"
