"""The one runner: whatever ends a command becomes one line on stderr and an exit code.

0 done, 1 it could not be done, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM. TMEXPORT_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import click

from tmexport.errors import TmexportError, one_line

TRACEBACK = "TMEXPORT_TRACEBACK"
_SIGNALS = {"SIGTERM": 143, "SIGHUP": 129}  # they unwind as Ctrl-C does, so that temporary files are removed
_THREADS = (
    "the limit of threads is reached; use --threads 1, or raise the limit (ulimit -u, or the container's limit of pids)"
)
_MEMORY = "not enough memory; nothing was left half written"

# A command, or what imports it: an error while importing is one line too.
Command = click.Command | Callable[[], click.Command]


def run_command(command: Command, name: str, args: Sequence[str] | None = None) -> NoReturn:
    """Run a click command as a program called `name`, with `args` or else the process's own; ends the process."""
    _prepare()
    code = outcome(command, name, list(sys.argv[1:] if args is None else args))
    _on_interrupt(signal.SIG_DFL)  # the result is there: while the libraries end, Ctrl-C just ends the process
    sys.exit(code)


def outcome(command: Command, name: str, args: list[str]) -> int:
    """Run a click command; its exit code. What went wrong is said in one line on stderr."""
    try:
        code = _invoke(command, name, args)
        sys.stdout.flush()
    except BaseException as error:
        return _report(error)
    return code


def _invoke(command: Command, name: str, args: list[str]) -> int:
    if not isinstance(command, click.Command):
        command = command()
    if os.environ.get("_TMEXPORT_COMPLETE"):  # a shell asks for completions
        command.main(args, name, "_TMEXPORT_COMPLETE")
    try:  # not command.main: that takes an EOFError for Ctrl-C
        with command.make_context(name, args) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return 0


def _prepare() -> None:
    """Signals that unwind, streams that can show any text, warnings of one line."""
    with contextlib.suppress(ValueError):  # not in the main thread
        for name, code in _SIGNALS.items():
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, _ending(code))
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a cp1252 terminal has no omega
    warnings.showwarning = _warn
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # __main__.py's; one that is ignored (nohup) stays so
        _on_interrupt(signal.default_int_handler)


def _on_interrupt(handler: Any) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, handler)


class _Stderr(io.TextIOWrapper):
    """Stderr, which may be full or a closed pipe: a remark that cannot be made does not end the command."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def _open_streams() -> None:
    """Nothing is said where stdout or stderr is closed; but no file that is opened later may take their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    real = sys.__stderr__
    if real is None:
        sys.stderr = _Stderr(os.fdopen(2, "wb", closefd=False), "utf-8", line_buffering=True)
    elif sys.stderr is real:  # no test's
        sys.stderr = _Stderr(real.buffer, real.encoding, line_buffering=True)


def _ending(code: int) -> Callable[..., NoReturn]:
    def end(*_: object) -> NoReturn:
        sys.exit(code)

    return end


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    _say("warning: " + one_line(str(message).strip().split("\n")[0]))


def _report(error: BaseException) -> int:
    """Say in one line why the command ended; its exit code."""
    if isinstance(error, SystemExit):
        if error.code in _SIGNALS.values():
            _say("terminated; no file was left half written")
        return error.code if isinstance(error.code, int) else 1
    if os.environ.get(TRACEBACK):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, BrokenPipeError):  # the reader has enough
        _silence_stdout()
        return 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()  # what was said so far, before the reason why there is no more
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        _say(str(error) or "interrupted; no file was left half written")
        return 130
    if isinstance(error, click.ClickException):
        _say("error: " + _usage(error))
        return error.exit_code
    _say("error: " + _reason(error))
    _silence_stdout()
    return error.exit_code if isinstance(error, TmexportError) else 1


def _usage(error: click.ClickException) -> str:
    text = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    return one_line(text if context is None else f"{text.removesuffix('.')} (see {context.command_path} --help)")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, TmexportError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return _MEMORY
    if any(isinstance(e, RuntimeError) and "can't start new thread" in str(e) for e in _with_causes(error)):
        return _THREADS
    if isinstance(error, OSError):
        if "No usable temporary directory" in text:
            return f"{str(error.strerror)[:1].lower()}{str(error.strerror)[1:]}; set TMPDIR to a folder that can be written"
        if error.filename is not None:
            return one_line(f"{os.fsdecode(error.filename)}: {error.strerror}")
        if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EBADF):
            return f"the output cannot be written: {error.strerror}"
    return one_line(
        f"unexpected {type(error).__name__}{': ' if text else ''}{text} ({TRACEBACK}=1 shows where it came from)"
    )


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it arose from: a pool that cannot start a thread fails again while it ends."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _silence_stdout() -> None:
    """Send what is still buffered for stdout nowhere: it cannot be written, and the flush at exit must not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed: the exit code speaks
        click.echo(line, err=True)
