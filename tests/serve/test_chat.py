"""`tmexport chat` and `generate --chat`: the same template, exact continuation of the state, Ctrl-C, /reset, /save."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from runtime_ref.chat import Conversation, chat
from runtime_ref.command import DEMO_MODEL
from runtime_ref.generate import generate
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling
from runtime_ref.serve.vocabulary import Vocabulary
from runtime_ref.tokenizer import Tokenizer
from tests.commands import invoke
from tests.demo.running import ROOT
from tests.serve.running import TEMPLATE
from tmexport.chat_template import ChatTemplate
from tmexport.gguf.reader import open_gguf

END = (0,)


@pytest.fixture(scope="module")
def model():
    return Model.load(DEMO_MODEL, "exact", 1)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(DEMO_MODEL)


def rendered(*turns):
    names = ("User", "Assistant")
    return "".join(f"{names[i % 2]}: {text}\n\n" for i, text in enumerate(turns)) + "Assistant:"


def greedy(model, tokenizer, text, count):
    return tokenizer.decode(list(model.generate(tokenizer.encode(text), count, stop=END)))


def test_turns_equal_whole_conversations_read_anew(model, tokenizer):
    template = ChatTemplate.from_gguf(open_gguf(DEMO_MODEL), TEMPLATE)
    conversation = Conversation(model, Vocabulary(tokenizer, 3840), template, END)
    conversation.reset(None)
    turns, costs = [], []
    for turn in range(4):
        turns.append(f"Tell me of matter number {turn}.")
        text = "".join(conversation.answer(turns[-1], 30, Sampling()))
        assert text == greedy(model, tokenizer, rendered(*turns), 30)
        turns.append(text)
        costs.append(conversation.read_tokens)
    assert [m["content"] for m in conversation.messages] == turns
    assert max(costs[1:]) < 60  # the turn, not the conversation


def test_the_command_answers_lines(model, tokenizer, template, tmp_path):
    lines = (
        "How is the Union?\n/save {0}\nAnd the army?\n/reset\nHow is the Union?\n/nonsense\n/save {1}\n/exit\nnever\n"
    )
    saved = tmp_path / "a.json", tmp_path / "b.json"
    result = invoke(
        chat, "--chat-template", template, "--temperature", 0, "-n", 12, "-t", 1, stdin=lines.format(*saved)
    )
    assert result.exit_code == 0, result.stderr
    first = greedy(model, tokenizer, rendered("How is the Union?"), 12)
    second = greedy(model, tokenizer, rendered("How is the Union?", first, "And the army?"), 12)
    assert result.stdout == f"{first}\n{second}\n{first}\n"
    assert "'/nonsense' is no command" in result.stderr
    wanted = [{"role": "user", "content": "How is the Union?"}, {"role": "assistant", "content": first}]
    assert [json.loads(path.read_text()) for path in saved] == [wanted, wanted]


def test_generate_chat_answers_a_message(model, tokenizer, template):
    common = ["--prompt", "How is the Union?", "-n", 12, "-t", 1, "--chat", "--chat-template", template]
    wanted = greedy(model, tokenizer, rendered("How is the Union?"), 12)
    assert invoke(generate, *common).stdout == wanted + "\n"
    made = json.loads(invoke(generate, *common, "--json").stdout)
    assert made["text"] == wanted
    assert made["prompt_tokens"] == len(tokenizer.encode(rendered("How is the Union?")))


@pytest.mark.parametrize(
    ("command", "args", "said"),
    [
        (chat, [], "has no chat template; give one with --chat-template"),
        (generate, ["--chat", "--prompt", "a"], "has no chat template"),
        (generate, ["--chat", "--tokens", "1"], "--chat takes a text"),
        (generate, ["--chat-template", "x", "--prompt", "a"], "--chat-template is for --chat"),
        (chat, ["--chat-template", "missing.jinja"], "missing.jinja"),
        (chat, ["--temperature", "-1"], "temperature is -1"),
    ],
)
def test_what_cannot_be_is_one_line(command, args, said):
    result = invoke(command, *args, stdin="")
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_a_template_that_refuses_ends_the_turn_only(tmp_path, tokenizer, model):
    (tmp_path / "t").write_text(
        "{% if 'no' in messages[-1].content %}{{ raise_exception('not that') }}{% endif %}" + TEMPLATE
    )
    result = invoke(chat, "--chat-template", tmp_path / "t", "--temperature", 0, "-n", 5, "-t", 1, stdin="no\nyes\n")
    assert result.exit_code == 0
    assert result.stderr == "error: the chat template refuses these messages: not that\n"
    assert result.stdout == greedy(model, tokenizer, rendered("yes"), 5) + "\n"


def test_ctrl_c_stops_the_answer_and_not_the_conversation(template):
    """On a terminal: an answer of 100,000 tokens is stopped, and the next line is answered."""
    code = "from tmexport.cli import main; main()"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", code, "chat", "--chat-template", str(template), "-n", "100000", "-t", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT, text=True)
    os.close(theirs)
    read_until(ours, "> ")
    os.write(ours, b"How is the Union?\n")
    read_until(ours, "\n", extra=200)
    process.send_signal(signal.SIGINT)
    read_until(ours, "> ")
    os.write(ours, b"/exit\n")
    assert process.wait(30) == 0
    os.close(ours)


def read_until(descriptor, text, extra=0):
    """Until `text` has come, and so many more characters; what was read."""
    seen, end = "", time.monotonic() + 200
    while (at := seen.find(text)) < 0 or len(seen) < at + len(text) + extra:
        assert time.monotonic() < end, f"only {seen[-300:]!r} came"
        if select.select([descriptor], [], [], 0.5)[0]:
            seen += os.read(descriptor, 4096).decode(errors="replace")
    return seen


def test_numbers_of_the_first_answer_are_generates(model, tokenizer):
    """A sampled first answer draws what `generate` with that seed draws."""
    template = ChatTemplate.from_gguf(open_gguf(DEMO_MODEL), TEMPLATE)
    conversation, how = Conversation(model, Vocabulary(tokenizer, 3840), template, END), Sampling(0.9, seed=4)
    text = "".join(conversation.answer("Speak.", 20, how))
    tokens = list(model.generate(tokenizer.encode(rendered("Speak.")), 20, how, stop=END))
    assert text == tokenizer.decode(tokens)
    assert text != "".join(conversation.answer("Speak.", 20, how))
