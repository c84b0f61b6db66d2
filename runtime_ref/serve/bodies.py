"""The bodies of /v1/completions and /v1/chat/completions, checked, as an `Asked`."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runtime_ref.sampling import Sampling
from runtime_ref.serve.fields import BadRequest, Fields
from runtime_ref.serve.vocabulary import Vocabulary
from tmexport.chat_template import ChatTemplate, chat_tokens
from tmexport.errors import UsageError

if TYPE_CHECKING:
    from runtime_ref.serve.grammar import Constraint, Grammars

ROLES = ("system", "developer", "user", "assistant", "tool")
_PROMPTS, _CHOICES, _STOPS, _STOP, _TOP, _MESSAGES = 64, 64, 16, 1000, 20, 4096
_DEFAULT = 16  # tokens of a completion, as OpenAI's

_COMMON = {
    "model", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options", "max_tokens", "logprobs",
    "response_format", "grammar",
}  # fmt: skip
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
_REFUSED = {"presence_penalty", "frequency_penalty", "logit_bias", "tools", "functions", "tool_choice", "function_call", "parallel_tool_calls", "best_of", "suffix", "modalities", "audio", "prediction"}  # fmt: skip
_COMPLETION = _COMMON | _WITHOUT_EFFECT | _REFUSED | {"prompt", "echo"}
_CHAT = _COMMON | _WITHOUT_EFFECT | _REFUSED | {"messages", "max_completion_tokens", "top_logprobs"}


@dataclass(frozen=True)
class Asked:
    """What a request wants.

    prompts: token ids of each. n: texts for each. top: likeliest tokens to report with each token, None to report none.
    usage: whether a stream ends with the numbers of tokens. boundaries: prompt tokens at the ends of messages.
    """

    chat: bool
    prompts: list[list[int]]
    n: int
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    top: int | None
    echo: bool
    stream: bool
    usage: bool
    constraint: Constraint | None
    boundaries: tuple[int, ...] = ()


class Bodies:
    """Reads bodies for one model."""

    def __init__(
        self, name: str, vocabulary: Vocabulary, ends: tuple[int, ...], template: ChatTemplate | None, most: int
    ) -> None:
        """Args: its name; its tokens; those that end a text; its template; the most tokens of a prompt and its answer."""
        self._name, self._vocabulary, self._ends, self._template, self._most = name, vocabulary, ends, template, most

    @cached_property
    def _grammars(self) -> Grammars:
        from runtime_ref.serve.grammar import Grammars

        if not self._ends:
            raise BadRequest("this model has no token that ends a text, so a form cannot be asked for")
        return Grammars(self._vocabulary, self._ends)

    def completion(self, body: dict[str, Any]) -> Asked:
        """A body of /v1/completions.

        Raises:
            BadRequest: anything in it is wrong.
        """
        fields = self._fields(body, _COMPLETION)
        prompts = self._prompts(fields)
        max_tokens = fields.whole("max_tokens", _DEFAULT, 0, self._most)
        top = None if fields.get("logprobs") is None else fields.whole("logprobs", 0, 0, _TOP)
        self._check_length(prompts, max_tokens, "prompt")
        return Asked(False, prompts, max_tokens=max_tokens, top=top, echo=fields.flag("echo"), **self._common(fields))

    def chat(self, body: dict[str, Any]) -> Asked:
        """A body of /v1/chat/completions.

        Raises:
            BadRequest: anything in it is wrong, or the model has no chat template.
        """
        fields = self._fields(body, _CHAT)
        if self._template is None:
            raise BadRequest("this model has no chat template; use /v1/completions, or start the server with --chat-template FILE")  # fmt: skip
        messages = read_messages(fields)
        try:
            prompt, boundaries = chat_tokens(self._template, self._vocabulary.tokenizer.encode, messages)
        except UsageError as error:
            raise BadRequest(str(error), field="messages") from None
        if not prompt:
            raise BadRequest("messages make no tokens", field="messages")
        self._check_length([prompt], 1, "messages")
        room = self._most - len(prompt)
        name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
        max_tokens = min(fields.whole(name, room, 1, self._most), room)
        asked_top = fields.whole("top_logprobs", 0, 0, _TOP)
        top = asked_top if fields.flag("logprobs") else None
        if asked_top and top is None:
            raise fields.wrong("top_logprobs", "needs logprobs to be true")
        return Asked(True, [prompt], max_tokens=max_tokens, top=top, echo=False, boundaries=boundaries, **self._common(fields))  # fmt: skip

    def _fields(self, body: dict[str, Any], known: set[str]) -> Fields:
        fields = Fields(body)
        fields.check_names(known)
        model = fields.text("model", 1000)
        if model not in (None, self._name):
            raise BadRequest(f"the model {model!r} is not here; this server has {self._name!r}", 404, "model")
        fields.absent("presence_penalty", "frequency_penalty", unless=(0,))
        fields.absent("logit_bias", "tools", "functions", "audio", "prediction", "suffix", unless=("",))
        fields.absent("tool_choice", "function_call", unless=("none", "auto"))
        fields.absent("modalities", unless=(["text"],))
        fields.absent("best_of", unless=(fields.whole("n", 1, 1, _CHOICES),))
        return fields

    def _common(self, fields: Fields) -> dict[str, Any]:
        seed = fields.whole("seed", secrets.randbits(63), -(2**63), 2**64 - 1) % 2**64
        sampling = Sampling(
            fields.number("temperature", 1.0, 0.0, 1000.0), fields.whole("top_k", 0, 0, 2**31),
            max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-9), seed,
        )  # fmt: skip
        options = Fields(fields.object("stream_options") or {}, "stream_options.")
        options.check_names(["include_usage", "include_obfuscation"])
        return {
            "n": fields.whole("n", 1, 1, _CHOICES), "sampling": sampling, "stops": fields.texts("stop", _STOPS, _STOP),
            "stream": fields.flag("stream"), "usage": options.flag("include_usage"), "constraint": self._constraint(fields),
        }  # fmt: skip

    def _constraint(self, fields: Fields) -> Constraint | None:
        grammar, form = fields.text("grammar", 100_000), fields.object("response_format")
        kind = None if form is None else form.get("type")
        if grammar is not None and kind not in (None, "text"):
            raise fields.wrong("grammar", "and response_format are two forms of one answer; give one")
        if grammar is not None:
            return self._grammars.text(grammar)
        if form is None or kind == "text":
            return None
        if kind == "json_object":
            return self._grammars.json({"type": "object"})
        inner = form.get("json_schema")
        schema = inner.get("schema") if kind == "json_schema" and isinstance(inner, dict) else None
        if not isinstance(schema, dict):
            raise fields.wrong("response_format", 'is of no known type; expected "text", "json_object", or "json_schema" with json_schema.schema')  # fmt: skip
        return self._grammars.json(schema)

    def _prompts(self, fields: Fields) -> list[list[int]]:
        """A text, a list of texts, a list of token ids, or a list of such lists."""
        value = fields.get("prompt")
        single = isinstance(value, str) or (isinstance(value, list) and bool(value) and type(value[0]) is int)
        values = [value] if single else value
        if not isinstance(values, list) or not 1 <= len(values) <= _PROMPTS:
            raise fields.wrong("prompt", f"is not a text, token ids, or a list of 1 to {_PROMPTS} of either")
        return [self._prompt(fields, v) for v in values]

    def _prompt(self, fields: Fields, value: Any) -> list[int]:
        if isinstance(value, str):
            ids = self._encode(fields, value)
        elif isinstance(value, list) and all(type(i) is int for i in value):
            ids = value
            bad = next((i for i in ids if not 0 <= i < self._vocabulary.size), None)
            if bad is not None:
                raise fields.wrong("prompt", f"has the token {bad}; expected 0 to {self._vocabulary.size - 1}")
        else:
            raise fields.wrong("prompt", "holds something that is neither a text nor a list of token ids")
        if not ids:
            raise fields.wrong("prompt", "has no tokens; expected at least one character")
        return ids

    def _encode(self, fields: Fields, text: str) -> list[int]:
        try:
            return self._vocabulary.tokenizer.prompt(text)
        except UsageError as error:
            raise fields.wrong("prompt", f"cannot be tokenised: {error}") from None

    def _check_length(self, prompts: list[list[int]], more: int, field: str) -> None:
        longest = max(map(len, prompts))
        if longest + more > self._most:
            raise BadRequest(f"{field} has {longest} tokens, and {more} are asked for; this server takes {self._most} together", field=field)  # fmt: skip


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """The messages of a chat, each with a role and a text.

    Raises:
        BadRequest: they are something else.
    """
    values = fields.get("messages")
    if not isinstance(values, list) or not 1 <= len(values) <= _MESSAGES:
        raise fields.wrong("messages", f"is not a list of 1 to {_MESSAGES} messages")
    return [_message(value, f"messages[{i}].") for i, value in enumerate(values)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRequest(f"{where[:-1]} is not an object", field=where[:-1])
    fields = Fields(value, where)
    fields.check_names(["role", "content", "name", "refusal", "tool_calls", "function_call", "annotations", "audio", "tool_call_id"])  # fmt: skip
    fields.absent("tool_calls", "function_call", "audio")
    role = fields.get("role")
    if role not in ROLES:
        raise fields.wrong("role", f"is none of {', '.join(ROLES)}")
    content = value.get("content")
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise fields.wrong("content", "has a part that is not a text, which this model cannot read")
        fields = Fields({**value, "content": "".join(texts)}, where)
    text = fields.text("content", 2**31)
    if text is None:
        raise fields.wrong("content", "is missing; expected a text")
    return {"role": "system" if role == "developer" else role, "content": text}
