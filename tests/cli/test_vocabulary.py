"""One word for one thing in every command; help texts are sentences; what the documentation showed before still works."""

import json
import threading

import click
import pytest

from runtime_ref.bench.cli import bench
from runtime_ref.command import DEMO_MODEL
from runtime_ref.generate import generate
from runtime_ref.perplexity import perplexity
from tests.commands import invoke
from tests.models import write_small
from tmexport.cli import VERBS, cli, load


def every_command():
    for name in VERBS:
        command = load(name)
        yield from (
            [(name, command)]
            if not isinstance(command, click.Group)
            else [(f"{name} {part}", command.commands[part]) for part in command.commands]
        )


COMMANDS = dict(every_command())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_are_sentences(name):
    for option in COMMANDS[name].params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, (name, option.opts)
            assert option.help[0].isupper() or option.help.split(":")[0].split(" ")[0] in {
                *(option.type.choices if isinstance(option.type, click.Choice) else ()),
                "0",
                "past_ssm.0",
            }, (name, option.opts, option.help)
            assert option.help.rstrip().endswith((".", "]")) or ":" in option.help, (name, option.opts, option.help)
    assert "Example" in COMMANDS[name].help or "Example" in (COMMANDS[name].epilog or "")


@pytest.mark.parametrize("name", COMMANDS)
def test_threads_and_prompt_have_one_spelling(name):
    for option in COMMANDS[name].params:
        if option.name == "threads":
            assert set(option.opts) == {"-t", "--threads"}
        if option.name == "prompt":
            assert set(option.opts) == ({"-p"} if name == "bench" else {"-p", "--prompt"})
        if name != "bench":
            assert "-p" not in option.opts or option.name == "prompt"


def test_onnx_says_q8_0_and_takes_q8(tmp_path):
    source = write_small(tmp_path / "ckpt", group_size=256)
    for spelling in ("q8_0", "q8"):
        result = invoke(cli, "onnx", source, tmp_path / f"{spelling}.onnx", "--embedding-type", spelling, "--json")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["embedding_type"] == "q8_0"
        assert "q8\n" not in result.stderr
    assert (tmp_path / "q8.onnx").read_bytes() == (tmp_path / "q8_0.onnx").read_bytes()
    assert "embedding q8_0," in invoke(cli, "inspect", tmp_path / "q8.onnx").stdout
    assert "[q8_0|f16|f32]" in invoke(cli, "onnx", "--help").stdout
    assert invoke(cli, "onnx", source, tmp_path / "x.onnx", "--embedding-type", "q9").exit_code == 2


def commands(model, text):
    return {
        "generate": (generate, [model, "-p", "River", "-n", 1, "-t", 2]),
        "perplexity": (perplexity, [model, text, "-t", 2]),
        "bench": (bench, [model, "-p", 1, "-n", 1, "-t", 2, "-r", 1, "--depth", 0, "--chunks", 1]),
    }


@pytest.mark.parametrize("name", ["generate", "perplexity", "bench"])
def test_the_limit_of_threads_is_one_line(tmp_path, monkeypatch, name):
    (tmp_path / "a.txt").write_text("River")
    command, args = commands(DEMO_MODEL, tmp_path / "a.txt")[name]

    def refused(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    result = invoke(command, *args)
    assert (result.exit_code, result.stderr) == (
        1,
        "error: the limit of threads is reached; use --threads 1, or raise the limit (ulimit -u, or the container's limit of pids)\n",
    )


@pytest.mark.parametrize("name", ["generate", "perplexity", "bench"])
def test_a_damaged_model_is_one_line(tmp_path, name):
    (tmp_path / "a.txt").write_text("River")
    (tmp_path / "m.gguf").write_bytes(DEMO_MODEL.read_bytes()[:5000])
    for model, code in ((tmp_path / "m.gguf", 1), (tmp_path / "none.gguf", 1), (tmp_path, 1)):
        command, args = commands(model, tmp_path / "a.txt")[name]
        result = invoke(command, *args)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1), result.stderr
        assert str(model) in result.stderr
        assert "unexpected" not in result.stderr
