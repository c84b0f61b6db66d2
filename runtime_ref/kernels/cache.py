"""Compiled kernels kept on the disk, whatever the disk is like; `cached` takes the place of Numba's njit(cache=True).

A function's code for one CPU and one signature is one file, with a SHA-256 of its name and of what follows: a file that is empty,
cut, altered or another's counts as none and is written again. Files are read from every folder below, and written to the first that can be
written, which is tried before the first compilation:

    $NUMBA_CACHE_DIR, if set; the package's __pycache__; the user's cache folder; a folder of the user's in /tmp.

If none can be, every process compiles. A warning of one line says where the files are if that is not the first choice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache as once
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite.binding import add_symbol
from numba.core import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python
from numba.core.serialize import dumps

from runtime_ref.kernels.linking import Whole

_MAGIC = b"runtime_ref kernel 2\n"
_ROOM = 32 << 20  # bytes that must be free: the kernels of a model are some megabytes
_PACKAGE = Path(__file__).parent
_compiled: list[str] = []  # by this process
_PRESETS = _PACKAGE.parent / "arithmetic.py"  # its constants are compiled in


def cached(about: tuple[str, ...] = (), **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: numba.njit(**options), linked as a `Whole`, with its machine code kept as this module says.

    about: what tells the function from others of the same code, where it is not what its free variables hold.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options, pipeline_class=Whole)(function)
        dispatcher._cache = KernelCache(function, about)
        return dispatcher

    return decorate


@once
def source_digest() -> int:
    """A digest of the kernels' source, part of every file's name: Numba itself looks at one file at a time only."""
    digest = hashlib.sha256()
    for path in (*sorted(_PACKAGE.rglob("*.py")), _PRESETS):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "little")


def compilations() -> int:
    """How many functions this process has compiled, because no file had them."""
    return len(_compiled)


class KernelCache(_Cache):
    """Numba asks `load_overload` before it compiles a signature, and gives `save_overload` the result."""

    def __init__(self, function: Callable[..., Any], about: tuple[str, ...]) -> None:
        self._function, self._about = function, about
        self._name = re.sub(r"\W+", "_", f"{function.__module__}.{function.__qualname__}")
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return os.pathsep.join(map(str, readable()))

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Remove this function's files from the folder that is written to."""
        for path in self._files(place()):
            _remove(path)

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        if not self._enabled:
            return None
        name = self._file_name(sig, target_context.codegen())
        for folder in readable():
            payload = _read(folder / name)
            if payload is None:
                continue
            _name_helpers()
            with contextlib.suppress(Exception):  # of another build under the same name: it counts as none
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
        place()  # before the compilation: what it has to say is not a surprise after the wait
        return None

    def holds(self, sig: Any) -> bool:
        """Whether a file has this signature's code, whole or damaged."""
        name = self._file_name(sig, cpu_target.target_context.codegen())
        return any((folder / name).is_file() for folder in readable())

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        _compiled.append(self._name)
        if not self._enabled or data.library.has_dynamic_globals or any(not x.can_cache for x in data.lifted):
            return
        name, payload = self._file_name(sig, data.codegen), dumps(data._reduce())
        folder = place()
        if folder is None:
            return
        try:
            _write(folder / name, payload)
        except OSError as error:
            _warn_not_kept(folder, error.strerror)
            return
        for path in self._files(folder):
            if f"-{source_digest():014x}-" not in path.name:
                _remove(path)  # of an older version of the kernels

    def _files(self, folder: Path | None) -> Iterator[Path]:
        if folder is not None:
            with contextlib.suppress(OSError):
                yield from folder.glob(f"{self._name}-*.kernel")

    def _source(self) -> bytes:
        """The file that the function is in, which may lie outside this package; nothing for code that is in none."""
        path = Path(self._function.__code__.co_filename)
        return path.read_bytes() if path.is_file() else b""

    def _file_name(self, sig: Any, codegen: Any) -> str:
        cells = () if self._about else tuple(cell.cell_contents for cell in self._function.__closure__ or ())
        about = (
            repr(sig), codegen.magic_tuple(), self._source(), self._function.__code__.co_code,
            dumps(cells) if cells else self._about,
            numba.__version__, llvmlite.__version__, sys.implementation.cache_tag,
        )  # fmt: skip
        key = hashlib.sha256(repr(about).encode()).hexdigest()[:20]
        return f"{self._name}-{source_digest():014x}-{key}.kernel"


@once
def _name_helpers() -> None:
    """Let LLVM find what compiled code calls of Numba's runtime.

    Numba would get all ready that a compilation needs: it compiles its counting of references and imports what it knows of
    Python, a third of a second and 57 MB that code from the disk has no use for.
    """
    for name, address in _nrt_python.c_helpers.items():
        add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


@once
def place() -> Path | None:
    """The folder that compiled code is written to; None if there is none."""
    reasons = []
    for folder in _folders():
        reason = _unusable(folder)
        if reason is None:
            if reasons:
                warnings.warn(f"{'; '.join(reasons)}; the compiled kernels are kept in {folder}", RuntimeWarning, stacklevel=2)  # fmt: skip
            return folder
        reasons.append(f"{folder}: {reason}")
    warnings.warn(f"{'; '.join(reasons)}; the compiled kernels are kept nowhere, every run compiles them", RuntimeWarning, stacklevel=2)  # fmt: skip
    return None


def readable() -> list[Path]:
    """The folders that may hold compiled code of this user's or the package's; a stranger's is not run."""
    trusted = [Path(config.CACHE_DIR), _PACKAGE / "__pycache__"]
    return [folder for folder in _folders() if folder in trusted or _is_ours(folder)]


@once
def _folders() -> list[Path]:
    own = hashlib.sha256(str(_PACKAGE).encode()).hexdigest()[:12]  # two installations do not share files
    found = [Path(config.CACHE_DIR)] if config.CACHE_DIR else []
    found.append(_PACKAGE / "__pycache__")
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(RuntimeError, OSError):  # a user without a home
        if given.is_absolute() or Path.home().is_dir():
            found.append((given if given.is_absolute() else Path.home() / ".cache") / "tmexport" / own)
    with contextlib.suppress(OSError):  # no temporary folder can be written
        user = os.getuid() if hasattr(os, "getuid") else "user"
        found.append(Path(tempfile.gettempdir()) / f"tmexport-{user}" / own)
    return found


def _unusable(folder: Path) -> str | None:
    """Why nothing can be written to the folder, which is made if need be; None if it can be used."""
    try:
        if not folder.is_dir():
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
        if folder not in (Path(config.CACHE_DIR), _PACKAGE / "__pycache__") and not _is_ours(folder):
            return "other users can write there"
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
        free = shutil.disk_usage(folder).free
        return None if free >= _ROOM else f"only {free // 1000} kB are free"
    except FileExistsError:
        return "no folder: a file is in the way"
    except OSError as error:
        return error.strerror or str(error)


def _is_ours(folder: Path) -> bool:
    """Whether only this user (or root) can have written there: code from the folder is run."""
    try:
        for level in (folder, folder.parent):
            status = level.lstat()
            if hasattr(os, "getuid") and (status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022):
                return False
        return folder.is_dir()
    except OSError:
        return False


def _read(path: Path) -> bytes | None:
    """What `_write` was given; None if there is no such file, or not all of it."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        data = path.read_bytes()
    except OSError:
        return None
    digest, payload = data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    return payload if data.startswith(_MAGIC) and _digest(path, payload) == digest else None


@once
def _warn_not_kept(folder: Path, reason: str | None) -> None:
    """Once for all functions."""
    warnings.warn(f"{folder}: the compiled kernels cannot be kept there ({reason}); the next run compiles again", RuntimeWarning, stacklevel=4)  # fmt: skip


def _digest(path: Path, payload: bytes) -> bytes:
    """Of the name too: what was compiled for another function must not come in its place."""
    return hashlib.sha256(path.name.encode() + b"\n" + payload).digest()


def _write(path: Path, payload: bytes) -> None:
    """The file appears whole: two processes may compile at once."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".kernel-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_MAGIC + _digest(path, payload) + payload)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        _remove(Path(temporary))
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
