"""Talk with a GGUF in the terminal.

    tmexport chat model.gguf
    echo "How is the Union?" | tmexport chat model.gguf --temperature 0

The conversation so far is a state: a turn costs the tokens of the turn, however long the conversation is.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("chat", "python -m runtime_ref.chat")

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import click
import numpy as np

from runtime_ref.command import DEMO_MODEL, for_terminal, profile_option, sampling_options
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling
from runtime_ref.serve.choice import Choice
from runtime_ref.serve.vocabulary import Vocabulary, load_speaker
from runtime_ref.speculative import Drafts
from runtime_ref.state import State
from tmexport.chat_template import ChatTemplate, Message, needed_template
from tmexport.cli.options import HELP, PATH, threads_option
from tmexport.errors import TmexportError, UsageError
from tmexport.files import atomic_write

_SLICE = 256  # tokens of a prompt between two looks for Ctrl-C
_COMMANDS = "/reset begins anew, /save FILE writes the messages, /exit ends; Ctrl-C stops an answer"


class Conversation:
    """Messages, and the state after what the model has read of them."""

    def __init__(self, model: Model, vocabulary: Vocabulary, template: ChatTemplate, ends: tuple[int, ...]) -> None:
        self._model, self._vocabulary, self._template, self._ends = model, vocabulary, template, ends
        self.messages: list[Message] = []
        self.read_tokens = 0  # by the last answer: what it cost
        self._past: list[tuple[list[int], State]] = []  # the last prompt, then that and its answer

    def reset(self, system: str | None) -> None:
        """Begin anew, with a system message if there is one."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def answer(
        self, text: str, count: int, sampling: Sampling, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[str]:
        """The model's answer to a message, piece by piece; it joins the messages as far as it came.

        Args:
            text: the user's message.
            count: the most tokens of the answer.
            sampling: how to choose them; an answer draws other numbers than the one before.
            stopped: asked between tokens, whether to end here.

        Raises:
            UsageError: the template refuses the message; it is then not part of the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._vocabulary.tokenizer.encode(self._template.render(messages))
        read, state = self._resume(ids)
        self.read_tokens, logits = len(ids) - read, np.zeros(0, np.float32)
        for start in range(read, len(ids), _SLICE):
            if stopped():
                return
            logits = self._model.prefill(state, ids[start : start + _SLICE])
        turn = sum(message["role"] == "user" for message in self.messages)
        self.messages = messages
        self._past = [(ids, state.copy())]
        yield from self._write(ids, state, logits, Choice(0, self._vocabulary, sampling, self._ends, count, draw=turn), stopped)  # fmt: skip

    def _write(
        self, ids: list[int], state: State, logits: np.ndarray, choice: Choice, stopped: Callable[[], bool]
    ) -> Iterator[str]:
        parts, shown = list[str](), 0
        read = Drafts(self._model, self._model.costs, ids).read

        def take(logits: np.ndarray) -> int | None:
            piece = choice.end("stop") if stopped() else choice.step(logits)
            if piece is not None:
                parts.append(piece.text)
            return None if choice.reason else choice.tokens[-1]

        following = take(logits)
        while True:
            yield from parts[shown:]
            shown = len(parts)
            if following is None:
                break
            following = read(state, following, choice.left - 1, take)
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        self._past.append(([*ids, *choice.tokens][: state.tokens], state))

    def _resume(self, ids: list[int]) -> tuple[int, State]:
        """How many of the tokens an earlier state has read, and that state.

        The answer's own tokens may not be those that its text is cut into: then the state before it is the one.
        """
        for tokens, state in reversed(self._past):
            if len(tokens) < len(ids) and ids[: len(tokens)] == tokens:
                return len(tokens), state.copy()
        return 0, self._model.new_state()


@click.command(context_settings=HELP)
@click.argument("model_path", metavar="[MODEL]", default=DEMO_MODEL, type=PATH)
@click.option("--system", help="What the model is told before the conversation.")
@click.option("--chat-template", type=PATH, help="A jinja file. Default: the template in the file.")
@click.option("-n", "--count", type=click.IntRange(1), default=512, show_default=True, help="The most tokens of an answer.")  # fmt: skip
@sampling_options(temperature=0.7)
@threads_option
@profile_option
def chat(
    model_path: Path,
    system: str | None,
    chat_template: Path | None,
    count: int,
    sampling: Sampling,
    threads: int | None,
    profile: str,
) -> None:
    """Talk with MODEL, a .gguf file with a chat template. A line is a message; Ctrl-C stops an answer.

    \b
    Lines that begin with / are commands:
      /reset       begin anew
      /save FILE   write the messages as JSON, as OpenAI's API takes them
      /exit        end (as does the end of the input)

    \b
    Examples:
      tmexport chat model.gguf --system "Answer in one sentence."
      echo "How is the Union?" | tmexport chat model.gguf --temperature 0
    """
    template = needed_template(model_path, chat_template)
    model, vocabulary, ends = load_speaker(model_path, profile, threads)
    conversation = Conversation(model, vocabulary, template, ends)
    conversation.reset(system)
    if sys.stdin is None:
        raise UsageError("stdin is closed; chat reads what is typed, or a pipe")
    if sys.stdin.isatty():
        click.echo(f"{model_path.stem}: {_COMMANDS}", err=True)
    for line in _lines():
        try:
            if line.startswith("/"):
                if not _obey(line, conversation, system):
                    return
            elif line.strip():
                _say(conversation, line, count, sampling)
        except TmexportError as error:
            click.echo(f"error: {error}", err=True)


def _lines() -> Iterator[str]:
    """What is typed, or piped in, line by line."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _obey(line: str, conversation: Conversation, system: str | None) -> bool:
    """Do what a command says; whether the conversation goes on."""
    command, _, rest = line.partition(" ")
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset(system)
    elif command == "/save" and rest.strip():
        with atomic_write(Path(rest.strip()).expanduser()) as file:
            file.write(json.dumps(conversation.messages, ensure_ascii=False, indent=1).encode() + b"\n")
    else:
        raise UsageError(f"{line[:80]!r} is no command: {_COMMANDS}")
    return True


def _say(conversation: Conversation, text: str, count: int, sampling: Sampling) -> None:
    shown = for_terminal if sys.stdout.isatty() else str
    with _interruptible() as stopped:
        for piece in conversation.answer(text, count, sampling, stopped):
            click.echo(shown(piece), nl=False)
    click.echo()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted and asked for between tokens, so that it never leaves a state half updated."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(noted)
    finally:
        signal.signal(signal.SIGINT, before)
