"""The commands in the documentation's code blocks, and the click commands that they name."""

import importlib
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import click

from tests.demo.running import ROOT
from tmexport.cli import load

DOCUMENTS = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Other people's commands; everything else must be ours.
FOREIGN = {"git", "pip", "source", "cd", "npm", "tar", "llama-completion", "llama-bench"}


def commands_in(document: Path) -> list[list[str]]:
    """The words of every command in the document's ```sh blocks, and of indented lines that begin with one of ours.

    Pipes and && separate commands; redirections and comments go.
    """
    found, text = [], document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(
        r"^ {4,}((?:tmexport|python -m (?:qat|runtime_ref|tmexport)\.\S+|python scripts/\S+|make) .*)",
        rest,
        re.MULTILINE,
    )
    for block in blocks:
        for line in block.replace("\\\n", " ").split("\n"):
            for part in re.split(r"\s(?:\||&&)\s", line):
                words = shlex.split(re.split(r"\s>\s", part)[0], comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def click_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The click command that a command line of ours names, and its arguments."""
    if words[0] == "tmexport":
        return importlib.import_module("tmexport.cli").cli, words[1:]
    assert words[0] == "python", f"{words[0]}: is neither ours nor known to be someone else's"
    module, rest = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
    if words[1] == "-m":
        verb = verb_of(module)
        if verb is not None:
            return load(verb), rest
    else:
        assert (ROOT / words[1]).is_file(), f"{words[1]}: no such script"
    namespace = vars(importlib.import_module(module))
    ours = [v for v in namespace.values() if isinstance(v, click.Command) and v.callback.__module__ == module]
    groups = [command for command in ours if isinstance(command, click.Group)]
    (command,) = groups or ours
    return command, rest


def verb_of(module: str) -> str | None:
    """The verb that `python -m module` runs, from its source; None if it runs something else."""
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    found = re.search(r'run_verb\("([a-z-]+)"', file.read_text(encoding="utf-8"))
    return found and found[1]


def parse(command: click.Command, args: list[str]) -> None:
    """Let click parse the arguments without running anything; paths need not exist.

    Raises:
        click.UsageError: an unknown subcommand or option, a bad value, or a missing argument.
    """
    while isinstance(command, click.Group) and args and not args[0].startswith("-"):
        found = command.get_command(click.Context(command), args[0])
        if found is None:
            raise click.UsageError(f"no such command: {args[0]}")
        command, args = found, args[1:]
    with patch.object(click.Path, "convert", lambda self, value, param, ctx: Path(value)):
        try:
            command.make_context(command.name, list(args))
        except click.exceptions.Exit:  # --help, --version
            return


def check_make(words: list[str]) -> None:
    """Every target and variable of a make command is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"make {word}: the Makefile has no {name}"
