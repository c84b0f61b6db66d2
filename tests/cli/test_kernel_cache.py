"""Where compiled code is kept, on machines where little can be written; what is damaged counts as none."""

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.demo.running import ROOT

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2

PROBE = """
import json, sys, tempfile, warnings
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from runtime_ref.kernels import cache
cache._PACKAGE, tempfile.tempdir = Path(sys.argv[1]), sys.argv[2]
free, limit = json.loads(sys.argv[3]), json.loads(sys.argv[4])
if free:  # bytes that are free in folders whose path holds a word
    real = cache.shutil.disk_usage
    cache.shutil.disk_usage = lambda path: next((SimpleNamespace(free=n) for word, n in free.items() if word in str(path)), real(path))
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
@cache.cached()
def add(a, b):
    room = np.empty(1, np.int64)  # of Numba's own runtime
    room[0] = a[0] + b
    return room[0]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    total = add(np.ones(1, np.int64), 2)
stats = add.stats
print(json.dumps({"total": total, "hits": sum(stats.cache_hits.values()), "misses": sum(stats.cache_misses.values()),
                  "compiler": "numba.typed.typeddict" in sys.modules,
                  "said": [str(w.message) for w in said if w.category is RuntimeWarning]}))
"""  # fmt: skip


def _bound_by_permissions() -> None:
    """Root without the capability to write where the permissions say no: as an ordinary user is."""
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those who are not root, and have none


class Machine:
    """Folders that a probe finds: the package's, a home, a temporary one."""

    def __init__(self, place: Path) -> None:
        self.place, self.free, self.limit, self.environment = place, {}, 0, {}
        for name in ("package", "home", "tmp"):
            (place / name).mkdir()

    def let(self, name: str, mode: int) -> None:
        (self.place / name).chmod(mode)

    def run(self) -> dict:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_", "HOME"))}
        environment |= {"HOME": str(self.place / "home"), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= self.environment
        arguments = [self.place / "package", self.place / "tmp", json.dumps(self.free), json.dumps(self.limit)]
        done = subprocess.run([sys.executable, "-c", PROBE, *map(str, arguments)], capture_output=True, text=True,
                              env=environment, cwd="/", check=False, preexec_fn=_bound_by_permissions)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found = json.loads(done.stdout)
        assert found["total"] == 3
        assert found.pop("compiler") == (found["hits"] == 0)  # which takes 57 MB and a third of a second
        return found

    def kernels(self) -> list[str]:
        """The top folder of every file of compiled code."""
        return [path.relative_to(self.place).parts[0] for path in self.place.rglob("*.kernel")]


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for name in ("package", "home", "tmp"):
        machine.let(name, 0o755)


def test_beside_the_package_when_that_can_be_written(machine):
    assert machine.run() == {"total": 3, "hits": 0, "misses": 1, "said": []}
    assert machine.kernels() == ["package"]
    assert machine.run() == {"total": 3, "hits": 1, "misses": 0, "said": []}


def test_in_the_users_cache_when_the_package_is_read_only(machine):
    machine.let("package", 0o555)
    found = machine.run()
    assert len(found["said"]) == 1
    assert "Permission denied" in found["said"][0]
    assert f"the compiled kernels are kept in {machine.place / 'home' / '.cache' / 'tmexport'}" in found["said"][0]
    assert machine.kernels() == ["home"]
    assert machine.run() == {"total": 3, "hits": 1, "misses": 0, "said": []}  # and says nothing more
    machine.environment["XDG_CACHE_HOME"] = "relative/is/ignored"
    assert machine.run()["hits"] == 1


def test_in_a_temporary_folder_without_a_home(machine):
    machine.let("package", 0o555)
    machine.let("home", 0o555)
    found = machine.run()
    assert f"are kept in {machine.place / 'tmp'}" in found["said"][0]
    assert machine.kernels() == ["tmp"]
    assert machine.run()["hits"] == 1
    machine.environment["HOME"] = "/dev/null/home"
    assert machine.run()["hits"] == 1


def test_nowhere_when_nothing_can_be_written(machine):
    for name in ("package", "home", "tmp"):
        machine.let(name, 0o555)
    for _ in range(2):
        found = machine.run()
        assert (found["hits"], found["misses"]) == (0, 1)
        assert len(found["said"]) == 1
        assert found["said"][0].endswith("the compiled kernels are kept nowhere, every run compiles them")


def test_a_read_only_package_that_brings_its_kernels_is_read(machine):
    machine.run()
    for name in ("package", "home", "tmp"):
        machine.let(name, 0o555)
    assert machine.run() == {"total": 3, "hits": 1, "misses": 0, "said": []}


def test_numbas_own_variable_comes_first(machine):
    machine.environment["NUMBA_CACHE_DIR"] = str(machine.place / "tmp" / "given")
    assert machine.run()["said"] == []
    assert [path.parent.name for path in machine.place.rglob("*.kernel")] == ["given"]
    machine.environment["NUMBA_CACHE_DIR"] = "/dev/null/x"
    assert "/dev/null/x: no folder: a file is in the way; the compiled kernels are kept in" in machine.run()["said"][0]


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:10], lambda data: data[:1000], lambda data: data[:-1], lambda data: bytes(len(data)),
    lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), lambda data: b"x" * 500,
    lambda data: data[:21] + hashlib.sha256(b"another.kernel\n" + data[53:]).digest() + data[53:],
], ids=["empty", "header", "cut", "one byte short", "zeros", "a bit", "half zeros", "other", "another function's"])  # fmt: skip
def test_damaged_files_are_written_again(machine, damage):
    machine.run()
    (path,) = machine.place.rglob("*.kernel")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert machine.run() == {"total": 3, "hits": 0, "misses": 1, "said": []}
    assert path.read_bytes()[:53] != damage(whole)[:53] or len(path.read_bytes()) > 1000
    assert machine.run()["hits"] == 1


@pytest.mark.parametrize("kind", ["pipe", "dangling link", "folder"])
def test_what_lies_there_and_is_no_file(machine, kind):
    machine.run()
    (path,) = machine.place.rglob("*.kernel")
    path.unlink()
    if kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    found = machine.run()
    assert (found["hits"], found["misses"]) == (0, 1)
    assert ["cannot be kept there (Is a directory)" in line for line in found["said"]] == [True] * (kind == "folder")
    assert machine.run()["hits"] == (kind != "folder")


def test_a_full_disk_is_passed_over(machine):
    machine.free = {"package": 100_000}
    found = machine.run()
    assert "only 100 kB are free; the compiled kernels are kept in" in found["said"][0]
    assert machine.kernels() == ["home"]
    machine.free = {"package": 100_000, "home": 0, "tmp": 0}
    assert machine.run()["hits"] == 1  # what is there is read


def test_a_disk_that_fills_up_while_writing(machine):
    machine.limit = 6000  # bytes a file may have: the trial's 4096 pass, the kernel does not
    found = machine.run()
    assert found["said"] == [f"{machine.place / 'package' / '__pycache__'}: the compiled kernels cannot be kept there (File too large); the next run compiles again"]  # fmt: skip
    assert list((machine.place / "package" / "__pycache__").iterdir()) == []


def test_a_folder_that_others_can_write_is_not_trusted(machine):
    """Whoever can write there could have us run code."""
    machine.let("package", 0o555)
    machine.let("home", 0o555)
    machine.run()
    (folder,) = (path.parent for path in machine.place.rglob("*.kernel"))
    folder.chmod(0o777)
    found = machine.run()
    assert (found["hits"], found["misses"]) == (0, 1)
    assert "other users can write there" in found["said"][0]


def test_older_versions_are_removed(machine):
    machine.run()
    (path,) = machine.place.rglob("*.kernel")
    name, _, key = path.name.split("-")
    (path.parent / f"{name}-{'0' * 14}-{key}").write_bytes(b"old")
    (path.parent / f"other-{'0' * 14}-{key}").write_bytes(b"another function's")
    path.unlink()
    machine.run()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, f"other-{'0' * 14}-{key}"])


SETTINGS = [
    ("NUMBA_NUM_THREADS=abc", 2, "error: Environment variable 'NUMBA_NUM_THREADS' is defined but its"),
    ("NUMBA_NUM_THREADS=0", 2, "error: NUMBA_NUM_THREADS is 0; expected 1 or more"),
    ("NUMBA_OPT=abc", 2, "error: Environment variable 'NUMBA_OPT'"),
    (
        "NUMBA_COLOR_SCHEME=abc",
        2,
        "error: Numba does not start with NUMBA_COLOR_SCHEME=abc: KeyError 'abc'; correct it",
    ),
    ("NUMBA_DISABLE_JIT=1", 2, "error: NUMBA_DISABLE_JIT is set"),
    ("NUMBA_CPU_FEATURES=abc", 2, "error: NUMBA_CPU_FEATURES holds 'abc'"),
    (
        "NUMBA_CPU_FEATURES=+abc",
        2,
        "error: NUMBA_CPU_FEATURES is '+abc'; LLVM says: '+abc' is not a recognized feature",
    ),
    ("NUMBA_CPU_NAME=abc", 2, "error: NUMBA_CPU_NAME is 'abc'; LLVM says: 'abc' is not a recognized processor"),
    ("NUMBA_CHROME_TRACE=/nonexistent/x", 2, "error: NUMBA_CHROME_TRACE is '/nonexistent/x', where no file can be"),
    ("NUMBA_CHROME_TRACE=/tmp", 2, "error: NUMBA_CHROME_TRACE is '/tmp', where no file can be written"),
    ("RUNTIME_REF_ISA=abc", 2, "error: RUNTIME_REF_ISA is 'abc'; expected one of"),
    ("NUMBA_ENABLE_AVX=0", 0, ""),
    ("OMP_NUM_THREADS=abc", 0, ""),
    ("OPENBLAS_NUM_THREADS=abc", 0, ""),
    ("RAYON_NUM_THREADS=abc", 0, ""),
    ("TOKENIZERS_PARALLELISM=abc", 0, ""),
    ("NUMBA_CACHE_DIR=/dev/null", 0, ""),
    ("NUMBA_CACHE_LOCATOR_CLASSES=abc", 0, ""),
    ("TMPDIR=/nonexistent", 0, ""),
    ("HOME=/nonexistent", 0, ""),
]


@pytest.mark.parametrize(("setting", "code", "line"), SETTINGS, ids=lambda value: str(value)[:40])
def test_settings_of_the_libraries_that_make_no_sense(setting, code, line):
    name, _, value = setting.partition("=")
    command = [sys.executable, "-m", "runtime_ref.generate", "--prompt", "River", "-n", "2", "--threads", "1", "--json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")} | {name: value}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    lines = [text for text in done.stderr.splitlines() if not text.startswith(("compil",))]
    assert len(lines) == bool(line), done.stderr
    assert not line or lines[0].startswith(line)


def test_generate_on_a_read_only_machine_with_a_damaged_cache(tmp_path):
    """The whole command: no home, a package nobody can write, then its files cut; the same text each time."""
    for package in ("runtime_ref", "tmexport"):
        shutil.copytree(ROOT / package, tmp_path / "site" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tmp").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))}
    environment |= {"HOME": "/dev/null/home", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    command = [sys.executable, "-m", "runtime_ref.generate", "--prompt", "River", "-n", "2", "--threads", "1", "--json"]

    def run():
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment, preexec_fn=_bound_by_permissions)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["tokens"], [x for x in done.stderr.splitlines() if not x.startswith("compil")]

    kernels = tmp_path / "site" / "runtime_ref" / "kernels"
    kernels.chmod(0o555)
    try:
        wanted, said = run()
        assert len(said) == 1
        assert f"the compiled kernels are kept in {tmp_path / 'tmp'}" in said[0]
        assert run() == (wanted, [])
        files = sorted((tmp_path / "tmp").rglob("*.kernel"))
        assert len(files) >= 2
        for number, path in enumerate(files):
            path.write_bytes(path.read_bytes()[: 1000 * number])
        assert run() == (wanted, said)
        assert all(path.stat().st_size > 5000 for path in files)
    finally:
        kernels.chmod(0o755)
