"""Files that appear under their final name complete, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tmexport.errors import TmexportError


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
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
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


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
