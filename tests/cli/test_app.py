"""The runner: whatever ends a command is one line and an exit code; and the table of verbs."""

import errno
import json
import os
import signal
import subprocess
import sys
import tomllib
import warnings

import click
import pytest

from tests.commands import invoke
from tests.demo.running import ROOT
from tests.models import write_small
from tmexport.cli import VERBS, app, cli, load
from tmexport.errors import CheckpointError, UsageError
from tmexport.extras import import_with


def raising(error):
    @click.command(name="probe")
    def probe():
        raise error

    return invoke(probe)


class PanicException(BaseException):
    """As the Rust libraries raise it: no Exception."""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("a and b"), 2, "error: a and b"),
        (CheckpointError("x\x1b[2J\n"), 1, r"error: x\x1b[2J\n"),
        (click.UsageError("no.\nway"), 2, "error: no. way"),
        (KeyboardInterrupt(), 130, "interrupted; no file was left half written"),
        (KeyboardInterrupt("interrupted; go on with --resume"), 130, "interrupted; go on with --resume"),
        (MemoryError(), 1, "error: not enough memory; nothing was left half written"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: 8 bytes"), 1,
         "error: not enough memory; nothing was left half written"),
        (RuntimeError("can't start new thread"), 1, "error: the limit of threads is reached; use --threads 1"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the output cannot be written: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "error: a/b: Permission denied"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 1,
         "error: no usable temporary directory found in ['/tmp']; set TMPDIR to a folder that can be written"),
        (EOFError(), 1, "error: unexpected EOFError (TMEXPORT_TRACEBACK=1"),
        (ZeroDivisionError("division\nby zero"), 1, "error: unexpected ZeroDivisionError: division by zero (TMEX"),
        (RecursionError("too deep"), 1, "error: unexpected RecursionError: too deep"),
        (PanicException("rust"), 1, "error: unexpected PanicException: rust"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_every_error_is_one_line_and_a_code(error, code, line):
    result = raising(error)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(line)


def test_a_closed_pipe_says_nothing():
    result = raising(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert (result.exit_code, result.stderr) == (1, "")


def test_the_traceback_is_there_when_asked_for(monkeypatch):
    monkeypatch.setenv(app.TRACEBACK, "1")
    result = raising(ZeroDivisionError("x"))
    assert "Traceback" in result.stderr
    assert "raise error" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unexpected ZeroDivisionError")


PROGRAM = """
import sys, warnings, click
from tmexport.cli.app import run_command
@click.command()
@click.option("--count", default=1)
def probe(count):
    {body}
run_command(probe, "probe")
"""


def program(body, **options):
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False, **options)


def test_wrong_usage_is_one_line_that_names_the_help():
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(body="pass"), "--coutn", "1"], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: No such option '--coutn'") or "--coutn" in done.stderr
    assert "(see probe --help)" in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437", "utf-8"])
def test_any_text_goes_through_any_terminal(encoding):
    body = 'click.echo("\\u03a9 a \\udcff"); click.echo("\\u03a9", err=True)'
    done = program(body, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0, done.stderr
    assert b" a " in done.stdout
    if encoding == "cp1252":
        assert done.stdout == b"\\u03a9 a \\udcff\n"


def test_a_full_device_behind_stdout():
    for body in ('click.echo("x")', 'print("x")', 'sys.stdout.write("x" * 100000)'):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-c", PROGRAM.format(body=body)]
            done = subprocess.run(command, cwd=ROOT, text=True, stdout=full, stderr=subprocess.PIPE, check=False)
        assert done.returncode == 1
        assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_a_full_device_behind_stderr_leaves_the_code():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", PROGRAM.format(body="raise ValueError")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("closed", "out", "err"),
    [(">&-", b"", b"said\n"), ("2>&-", b"out\n", b""), ("2>/dev/full", b"out\n", b""), ("<&- >&- 2>&-", b"", b"")],
)
def test_streams_that_are_closed_or_full_take_no_files_place_and_change_no_result(tmp_path, closed, out, err):
    """A file opened while stdout is closed would get its number, and what a library prints would be written into it."""
    body = f"""
    with open({str(tmp_path / "file")!r}, "w") as file:
        click.echo("out")
        click.echo("said", err=True)
        assert file.fileno() > 2
        file.write("whole")"""
    command = [sys.executable, "-c", PROGRAM.format(body=body.strip())]
    done = subprocess.run(["bash", "-c", f'"$@" {closed}', "-", *command], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_unwind(number, code):
    body = """
    import time
    try:
        click.echo("ready")
        time.sleep(60)
    finally:
        click.echo("cleaned")"""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(body=body.strip())], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.count("\n")) == (code, "cleaned\n", 1)


INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.{handler})
from tmexport.__main__ import main
sys.argv = ["tmexport", "gguf", "--help"]
main()
"""


@pytest.mark.parametrize(
    ("module", "handler", "code", "said"),
    [
        ("tmexport.cli", "default_int_handler", -signal.SIGINT, ""),  # nothing can answer it yet: no traceback either
        ("tmexport.cli.app", "default_int_handler", -signal.SIGINT, ""),
        ("tmexport.cli.gguf", "default_int_handler", 130, "interrupted; no file was left half written\n"),
        ("tmexport.cli", "SIG_IGN", 0, ""),  # nohup
        ("tmexport.cli.gguf", "SIG_IGN", 0, ""),
    ],
)
def test_ctrl_c_while_the_command_is_imported(module, handler, code, said):
    program = INTERRUPTED.format(module=module, handler=handler)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


def test_warnings_are_one_line():
    done = program('warnings.warn("first\\nTraceback (most recent call last):\\n  x")')
    assert (done.returncode, done.stderr) == (0, b"warning: first\n")
    assert warnings.showwarning is not app._warn


# --- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_its_command(name):
    command = load(name)
    assert isinstance(command, click.Command)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert VERBS[name].extra in {"", *extras}
    result = invoke(cli, name, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    if not isinstance(command, click.Group):
        assert "Example" in result.stdout


def test_help_lists_the_verbs_in_groups_and_imports_none_of_them():
    code = (
        "import sys; from tmexport.cli.app import outcome; from tmexport.cli import cli; outcome(cli, 'tmexport', ['--help'])\n"
        "print(sorted({'numpy', 'rich', 'torch', 'numba', 'onnx', 'qat', 'runtime_ref', 'zero_shot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [words[0] for words in lines if words and words[0] in VERBS] == list(VERBS)
    assert [line for line in done.stdout.splitlines() if line.endswith(" it:")] == ["Export it and prove it:", "Run it and measure it:"]  # fmt: skip
    assert not any(line.endswith("...") for line in done.stdout.splitlines()[10:])


def test_help_is_quick():
    """Under 0.15 s on an idle machine: the processor's time, which other work leaves alone, of the best of five."""

    def seconds():
        before = os.times()
        subprocess.run([sys.executable, "-c", "from tmexport.cli import main; main()", "--help"], cwd=ROOT, capture_output=True, check=True)  # fmt: skip
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < 0.15


def test_without_a_verb_and_with_a_wrong_one():
    nothing = invoke(cli)
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "Run it and measure it:" in nothing.stderr
    wrong = invoke(cli, "ggufs")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (2, 1)
    assert "ggufs" in wrong.stderr


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    (tmp_path / "wants_it.py").write_text("import no_such_package_at_all.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UsageError, match=r"no_such_package_at_all is not installed; run: pip install 'tmexport\[onnx\]'"
    ):
        import_with("onnx", "wants_it")
    (tmp_path / "ours_is_broken.py").write_text("import tmexport.no_such_module\n")
    with pytest.raises(ModuleNotFoundError):
        import_with("onnx", "ours_is_broken")


@pytest.mark.parametrize(
    ("module", "verb"),
    [("runtime_ref.generate", "generate"), ("runtime_ref.perplexity", "perplexity"), ("runtime_ref.bench", "bench")],
)
def test_module_forms_are_the_same_commands(module, verb):
    forms = [[sys.executable, "-m", module], [sys.executable, "-c", "from tmexport.cli import main; main()", verb]]
    texts = [
        subprocess.run([*form, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout for form in forms
    ]
    assert texts[0].split("\n")[1:] == texts[1].split("\n")[1:]
    assert f"python -m {module} " in texts[0].split("\n")[0]
    assert f"tmexport {verb} " in texts[1].split("\n")[0]


def test_python_m_tmexport_is_tmexport():
    forms = [[sys.executable, "-m", "tmexport"], [sys.executable, "-c", "from tmexport.cli import main; main()"]]
    texts = [
        subprocess.run([*form, "gguf", "--help"], cwd=ROOT, capture_output=True, check=True).stdout for form in forms
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("setting", "code"), [("OMP_NUM_THREADS=abc", 2), ("OMP_SCHEDULE=x", 2), ("OMP_NUM_THREADS=2", 0), ("KMP_AFFINITY=abc", 0)])  # fmt: skip
def test_a_variable_that_torchs_openmp_cannot_read(tmp_path, setting, code):
    write_small(tmp_path / "ckpt")
    (tmp_path / "t.txt").write_text("the union of the states")
    name, value = setting.split("=")
    command = [sys.executable, "-m", "qat.evaluate", tmp_path / "ckpt", "--data", tmp_path / "t.txt", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {name: value})
    said = f"error: {name} is {value!r}, which OpenMP cannot read; correct it, or unset it\n" if code else ""
    assert (done.returncode, done.stderr) == (code, said)
    assert code or json.loads(done.stdout)["tokens"] > 5
