"""Files that appear under their final name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tmexport.errors import CheckpointError, TmexportError, UsageError

_ENOUGH = 512  # bytes that tell what a file is
LORA = (
    "is a LoRA adapter, which is not a model by itself; merge it into its base model "
    "(peft: model.merge_and_unload().save_pretrained(FOLDER))"
)


def file_in(folder: Path | str, name: str) -> Path:
    """`folder`/`name`, after checking that it is a regular file inside the folder.

    A checkpoint folder is a stranger's: a link in it must not lead our reader elsewhere (and a pipe must not stop it). The
    one exception is Hugging Face's cache, where each file of `snapshots/<revision>/` is a link into `blobs/` beside it.

    Raises:
        CheckpointError: it is missing, not a regular file, or a link that leaves the folder.
    """
    path = Path(folder) / name
    try:
        real, home = path.resolve(strict=True), Path(folder).resolve(strict=True)
        is_file = real.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # ELOOP is a RuntimeError, a NUL in the name a ValueError
        raise CheckpointError(f"{path}: no such file ({getattr(error, 'strerror', None) or error})") from None
    caches = [place.parent for place in (home, *home.parents) if place.parent.name == "snapshots"]
    allowed = [home, *(snapshots.parent / "blobs" for snapshots in caches)]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: is a link that leaves the folder, to {real}; put the file itself there")
    if not is_file:
        raise CheckpointError(f"{path}: is not a regular file")
    return path


def read_text(path: Path, largest: int) -> str:
    """The text of a small UTF-8 file.

    Raises:
        ValueError: it has more than `largest` bytes, is not UTF-8, or is known to be something else.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size  # read(n) would set aside n bytes, however small the file
        if size > largest:
            raise ValueError(f"has {size} bytes; expected at most {largest}")
        data = file.read(size)
    found = named_by_its_start(data[:_ENOUGH])
    if found is not None:
        raise ValueError(found)
    return data.decode("utf-8-sig")  # a byte order mark is not part of the text


def what_it_is(path: Path) -> str | None:
    """What a file of weights is that is not what its name says: the rest of a message; None if nothing better is known."""
    try:
        with open(path, "rb") as file:
            start = file.read(_ENOUGH)
    except OSError:
        return None
    if start.startswith(b"PK\3\4") and path.suffix != ".bin":
        return "is a zip archive; unpack it, or, if torch wrote it, name it pytorch_model.bin"
    if start[8:10] == b'{"' and path.suffix != ".safetensors":
        return "is a safetensors file; name it model.safetensors"
    if start.startswith(b"{") and start[8:9] != b"{":  # a safetensors header's length may begin with that byte
        return "is a JSON text (the answer of a server that refused the download?); download the file again"
    return named_by_its_start(start)


_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def named_by_its_start(start: bytes) -> str | None:
    """What a file that starts so is, and is no model or text: the rest of a message; None if it is nothing known."""
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return "is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or download the file"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is a web page (a download that failed?); download the file again"
    if start.startswith(b"GGUF"):
        return "is a GGUF file, which is an export and no checkpoint"
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            return f"is compressed; unpack it ({program})"
    if start.startswith((b"\xff\xfe{", b"\xff\xfe[", b"\xfe\xff\0{", b"\xfe\xff\0[")):
        return "is UTF-16 text; save it as UTF-8"
    return None


def refuse_overwriting(out: Path, *read: Path | None) -> None:
    """Refuse to write over a file that the same command reads.

    Args:
        out: the file to write.
        read: files, and folders whose files are read; None: none.

    Raises:
        UsageError: `out` is one of them.
    """
    if not out.exists():
        return
    for path in filter(None, read):
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path] * path.exists()
        if any(out.samefile(file) for file in files):
            raise UsageError(f"{out}: is {'a file of the checkpoint' if path.is_dir() else 'the file'} itself; name another file to write")  # fmt: skip


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` only when the block ends without an error.

    It is written under a unique temporary name in the same folder, flushed to the disk and renamed, so `path` holds the
    old content or the new one, whatever interrupts, and two writers of one name never mix.

    Raises:
        TmexportError: the folder is missing or read-only, or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        if path.is_dir():
            raise TmexportError(f"{path}: is a folder; expected the name of a file to write")
        # the rename would replace /dev/null itself
        if path.exists() and not path.is_file():
            raise TmexportError(f"{path}: is a device or a pipe; expected the name of a file to write")
        if _is_of_the_system(path):
            raise TmexportError(f"{path}: lies in /dev or /proc; expected the name of a file to write")
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would surprise whoever shares the file
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TmexportError(f"{path}: cannot be written: {reason}; nothing was left behind") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _is_of_the_system(path: Path) -> bool:
    """Whether a name is one of /dev or /proc: /dev/stdout is a link to whatever file stdout is, and would become that file."""
    try:
        place = path.parent.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return False
    return place == Path("/dev") or place.is_relative_to("/proc")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where a folder can be opened: not on Windows, which has no O_DIRECTORY either."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
