"""The commands in the documentation's code blocks, and the click commands that they name."""

import importlib
import re
import shlex
from pathlib import Path
from unittest.mock import patch

import click

from tests.demo.running import ROOT
from tmexport.cli import cli, load

DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "scripts" / "demo" / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

# Other people's commands; everything else must be ours.
FOREIGN = {"git", "pip", "source", "cd", "npm", "tar", "llama-completion", "llama-bench", "curl", "hf", "uv", "podman"}


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
        return cli, words[1:]
    assert words[0] == "python", f"{words[0]}: is neither ours nor known to be someone else's"
    is_module = words[1] == "-m"
    name, rest = (words[2], words[3:]) if is_module else (words[1].removesuffix(".py").replace("/", "."), words[2:])
    path = ROOT.joinpath(*name.split("."))
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert source.is_file(), f"{' '.join(words)}: there is no {source}"
    if verb := re.search(r'run_verb\("([a-z-]+)"', source.read_text(encoding="utf-8")):
        return load(verb[1]), rest
    namespace = vars(importlib.import_module(name))
    (command,) = [v for v in namespace.values() if isinstance(v, click.Command) and v.callback.__module__ == name]
    return command, rest


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
