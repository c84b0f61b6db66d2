"""Running a command in this process, through the runner, as a user's shell would."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import click
from click.testing import CliRunner, Result

from tmexport.cli.app import outcome


def invoke(command: click.Command, *args: object, stdin: str | bytes | None = None) -> Result:
    """What the command printed (stdout, stderr) and its exit code."""

    def main(args: list[str], prog_name: str, **_: object) -> None:
        sys.exit(outcome(command, prog_name, list(args)))

    program = SimpleNamespace(name=command.name, main=main)
    return CliRunner().invoke(program, [str(arg) for arg in args], input=stdin, prog_name=f"tmexport {command.name}")  # type: ignore[arg-type]
