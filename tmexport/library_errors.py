"""What compiled libraries underneath say to stderr instead of to their caller."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, cast


@contextlib.contextmanager
def lines_on_stderr() -> Iterator[list[str]]:
    """Within the block, what C code writes to stderr (file descriptor 2) is kept; afterwards the yielded list has its lines."""
    lines: list[str] = []
    kept = os.dup(2)
    try:
        with _somewhere() as said:
            os.dup2(said.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(kept, 2)
                said.seek(0)
                lines += [line for line in said.read(2**16).decode("utf-8", "replace").splitlines() if line.strip()]
    finally:
        os.close(kept)


def _somewhere() -> BinaryIO:
    """A file of no name: in memory where the system has that, because no folder may be writable."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    try:
        return cast(BinaryIO, tempfile.TemporaryFile())
    except OSError:
        return open(os.devnull, "w+b")
