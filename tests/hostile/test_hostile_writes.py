"""Interrupted, starved and competing writes: the final name holds the old file or the new one, and nothing else is left.

Faults are set at exact places in a forked child, so that every place is met; scripts/faults/kill.py and
scripts/faults/disk.py do the same to the real command at random moments and on a real full disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.commands import invoke
from tests.hostile.expecting import OLD, names
from tests.models import SMALL, write_small
from tmexport import files
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli import cli
from tmexport.errors import TmexportError
from tmexport.files import atomic_write
from tmexport.gguf.reader import open_gguf
from tmexport.gguf.writer import PlannedTensor, write_gguf
from tmexport.types import GGMLType


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child: its exit status, negative for a signal; 0 if it returned, 70 if it raised."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def planned(seed: int = 0) -> list[PlannedTensor]:
    rng = np.random.default_rng(seed)
    data = [rng.integers(0, 256, (n, 4096), np.uint8) for n in (4, 64, 1, 300)]
    return [PlannedTensor(f"t{i}", (len(d), 1024), GGMLType.F32, lambda d=d: d) for i, d in enumerate(data)]


@pytest.fixture
def new(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("new") / "m.gguf"
    write_gguf(path, {"a": 1}, planned())
    open_gguf(path)
    return path.read_bytes()


def test_killed_after_each_tensor(folder, new):
    for number in range(len(planned())):
        count = [0]

        def on_tensor(tensor, count=count, number=number):
            count[0] += 1
            if count[0] > number:
                die()

        assert in_child(lambda f=on_tensor: write_gguf(folder / "m.gguf", {"a": 1}, planned(), f)) == -signal.SIGKILL
        assert (folder / "m.gguf").read_bytes() == OLD
    write_gguf(folder / "m.gguf", {"a": 1}, planned())
    assert (folder / "m.gguf").read_bytes() == new


@pytest.mark.parametrize(("call", "when", "survives"), [("fsync", "before", "old"), ("fsync", "after", "old"), ("chmod", "after", "old"),
                                                        ("replace", "before", "old"), ("replace", "after", "new")])  # fmt: skip
def test_killed_around_each_step_that_matters(folder, new, monkeypatch, call, when, survives):
    real = getattr(os, call)

    def fatal(*arguments):
        if when == "before":
            die()
        real(*arguments)
        die()

    monkeypatch.setattr(files.os, call, fatal)
    assert in_child(lambda: write_gguf(folder / "m.gguf", {"a": 1}, planned())) == -signal.SIGKILL
    assert (folder / "m.gguf").read_bytes() == (OLD if survives == "old" else new)


def test_the_data_is_on_the_disk_before_the_name_changes(folder, monkeypatch):
    steps = []
    for call in ("fsync", "replace"):
        real = getattr(os, call)
        monkeypatch.setattr(files.os, call, lambda *a, c=call, r=real: (steps.append(c), r(*a))[1])
    write_gguf(folder / "m.gguf", {"a": 1}, planned())
    assert steps == ["fsync", "replace", "fsync"]  # the data, the name, the folder that holds the name


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
def test_a_failing_step_gives_one_line_and_no_debris(folder, monkeypatch, call, number):
    def fails(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(
        TmexportError, match=rf"m.gguf: cannot be written: {os.strerror(number)}; nothing was left behind"
    ):
        write_gguf(folder / "m.gguf", {"a": 1}, planned())
    assert names(folder) == ["m.gguf"]
    assert (folder / "m.gguf").read_bytes() == OLD


@pytest.mark.parametrize("limit", [0, 1, 100, 4096, 100_000, 1_000_000])
def test_a_disk_that_fills_up(folder, limit):
    """A limit on the file's size gives the error at exactly that byte."""

    def starved():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(TmexportError, match="m.gguf: cannot be written: File too large; nothing was left behind"):
            write_gguf(folder / "m.gguf", {"a": 1}, planned())

    assert in_child(starved) == 0
    assert names(folder) == ["m.gguf"]
    assert (folder / "m.gguf").read_bytes() == OLD


def test_a_folder_that_may_not_be_written():
    """As nobody, because permissions do not bind root."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        os.chmod(place, 0o755)
        folder = Path(place) / "ro"
        folder.mkdir()
        (folder / "m.gguf").write_bytes(OLD)
        folder.chmod(0o555)
        tensors = planned()  # here: nobody may not be able to import what this imports

        def as_nobody():
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            with pytest.raises(TmexportError, match="m.gguf: cannot be written: Permission denied; nothing was left"):
                write_gguf(folder / "m.gguf", {"a": 1}, tensors)

        assert in_child(as_nobody) == 0
        assert names(folder) == ["m.gguf"]
        assert (folder / "m.gguf").read_bytes() == OLD


def test_places_where_no_file_can_be(tmp_path):
    (tmp_path / "file").write_bytes(OLD)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in [
        (tmp_path, "is a folder; expected the name of a file to write"),
        (tmp_path / "none" / "m", "cannot be written: No such file or directory"),
        (tmp_path / "file" / "m", "cannot be written: Not a directory"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (tmp_path / "pipe", "is a device or a pipe"),
        (Path("/dev/null"), "is a device or a pipe"),
        (tmp_path / "loop" / "m", "cannot be written: Too many levels of symbolic links"),
        (Path("/dev/model.gguf"), "lies in /dev or /proc"),  # as /dev/stdout, a link to a file where stdout is one
        (Path("/proc/self/fd/1"), "is a device or a pipe|lies in /dev or /proc"),
    ]:
        with pytest.raises(TmexportError, match=message):
            write_gguf(path, {"a": 1}, planned())
    assert names(tmp_path) == ["file", "loop", "pipe"]
    assert Path("/dev/null").is_char_device()


def test_no_command_writes_over_what_it_reads(tmp_path):
    write_small(tmp_path / "ckpt", group_size=256)
    tokenizer = tmp_path / "other.json"
    tokenizer.write_bytes((tmp_path / "ckpt" / "tokenizer.json").read_bytes())
    (tmp_path / "p.txt").write_text("the")
    assert invoke(cli, "gguf", tmp_path / "ckpt", tmp_path / "m.gguf").exit_code == 0
    (tmp_path / "link.gguf").symlink_to("m.gguf")
    model = ["generate", tmp_path / "m.gguf", "-n", "1", "--threads", "1", "--prompt-file", tmp_path / "p.txt"]
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for args in (
        ["gguf", tmp_path / "ckpt", tmp_path / "ckpt" / "model.safetensors"],
        ["gguf", tmp_path / "ckpt", tokenizer, "--tokenizer", tokenizer],
        ["onnx", tmp_path / "ckpt", tokenizer, "--tokenizer", tokenizer],
        [*model, "--save-state", tmp_path / "m.gguf"],
        [*model, "--save-state", tmp_path / "link.gguf"],
        [*model, "--save-state", tmp_path / "p.txt"],
        [*model, "--tokenizer", tokenizer, "--save-state", tokenizer],
    ):
        done = invoke(cli, *args)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "itself; name another file to write" in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_the_longest_name_a_file_can_have(tmp_path):
    for name in ("x" * 255, "\u00e9" * 127):
        with atomic_write(tmp_path / name) as file:
            file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def write_half(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as file:
        file.write(bytes(100_000))
        raise error


def test_an_error_while_writing_leaves_nothing(folder):
    for error in (KeyboardInterrupt, SystemExit, MemoryError, ValueError, AssertionError):
        with pytest.raises(error):
            write_half(folder / "m.gguf", error)
        assert names(folder) == ["m.gguf"]
        assert (folder / "m.gguf").read_bytes() == OLD


def test_permissions_follow_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            with atomic_write(tmp_path / "m"):
                pass
        finally:
            os.umask(old)
        assert (tmp_path / "m").stat().st_mode & 0o777 == mode


def test_two_writers_of_one_name_do_not_mix(tmp_path):
    path, wanted = tmp_path / "m.gguf", set()
    for seed in (1, 2):
        write_gguf(path, {"a": seed}, planned(seed))
        wanted.add(hashlib.sha256(path.read_bytes()).digest())

    def writes(seed: int) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(15):
                    write_gguf(path, {"a": seed}, planned(seed))
                os._exit(0)
            finally:
                os._exit(70)
        return pid

    children = [writes(1), writes(2)]
    seen, codes = set(), []
    while children:
        seen.add(hashlib.sha256(path.read_bytes()).digest())
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                children.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
    assert codes == [0, 0]
    assert seen <= wanted
    assert names(tmp_path) == ["m.gguf"]


def test_a_reader_keeps_the_file_it_opened(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"a": 1}, planned(1))
    reader = open_gguf(path)
    before = reader.blocks("t3").copy()
    write_gguf(path, {"a": 2}, planned(2))
    assert np.array_equal(reader.blocks("t3"), before)
    assert not np.array_equal(open_gguf(path).blocks("t3"), before)


def test_a_killed_checkpoint_writer_leaves_old_or_new_files(tmp_path, monkeypatch):
    """Three files, each whole; model.safetensors, the one that matters, is last."""
    folder = write_small(tmp_path / "ckpt", SMALL, 256, seed=1)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    source = open_checkpoint(write_small(tmp_path / "other", SMALL, 256, seed=2))
    tensors = {n: source.codes(n) if source.form(n) is not None else source.dense(n) for n in source.names}
    after = {name: (tmp_path / "other" / name).read_bytes() for name in before}
    real = os.replace
    for survivors in range(4):
        count = [0]

        def fatal(*arguments, count=count, survivors=survivors):
            if count[0] == survivors:
                die()
            count[0] += 1
            real(*arguments)

        monkeypatch.setattr(files.os, "replace", fatal)
        code = in_child(lambda: write_checkpoint(folder, SMALL, tensors, tmp_path / "other" / "tokenizer.json"))
        monkeypatch.undo()
        assert code == (-signal.SIGKILL if survivors < 3 else 0)
        for name in before:
            assert (folder / name).read_bytes() in (before[name], after[name])
        assert ((folder / "model.safetensors").read_bytes() == after["model.safetensors"]) == (survivors == 3)
        open_checkpoint(folder)
