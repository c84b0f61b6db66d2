"""Snapshots of the state, found again by the tokens that were read.

A snapshot's key is the SHA-256 of what made it: the model file, the arithmetic, and every token in order (SHA-256 is itself
a chain over its input, so the keys of all prefixes of a prompt cost one pass). A key that is found means the same bits.

On disk a snapshot is one file, `<key>-<tokens>.state`: 8 bytes of magic, the CRC-32 of the rest, a line of JSON (the key
once more, and the arrays' names, types and shapes) and the arrays. It is written under another name, flushed and renamed;
what does not check is deleted and counts as never written. The sum finds damage, as a disk or a crash does it; who can write
into the folder can make a sum as well, whatever its kind, and a SHA-256 takes longer than reading the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Full, Queue

import numpy as np

from runtime_ref.state import Extent, State
from tmexport.errors import TmexportError
from tmexport.files import atomic_write

_MAGIC = b"TMXSNAP2"
_NAME = re.compile(r"([0-9a-f]{64})-(\d{1,9})\.state")
_SUM = 4  # bytes
_PART = 1 << 20  # bytes that are read and summed at a time, while they are in the cache
_STALE = 60.0  # seconds after which a file that was never renamed belongs to nobody
_BACKLOG = 4  # snapshots that wait for the disk; further ones stay in memory only
_EVERY, _PER = 512, 32_000_000  # tokens between snapshots of a long prompt, for each so many bytes of state


@dataclass(frozen=True)
class Hit:
    """A copy of a snapshot: the state after `length` tokens and the logits fp32 [vocab] there."""

    length: int
    state: State
    logits: np.ndarray


@dataclass(frozen=True)
class _Entry:
    length: int
    state: State
    logits: np.ndarray

    @property
    def arrays(self) -> Iterator[np.ndarray]:
        yield from self.state.arrays.values()
        yield self.logits


class PrefixCache:
    """At most `size` bytes in memory and, with a folder, as many on disk; the least recently used leave first."""

    def __init__(self, like: State, vocab: int, identity: str, size: int, folder: Path | None = None) -> None:
        """An empty cache, or what earlier processes left in the folder.

        Args:
            like: a new state of the model.
            vocab: its number of logits.
            identity: what, besides the tokens, decides the bits of a state: the model file's digest and the arithmetic.
            size: bytes; 0 keeps nothing.
            folder: made if it is missing.

        Raises:
            TmexportError: the folder cannot be made or read.
        """
        self._size, self._folder = size, folder
        self.blank = _Entry(0, like, np.zeros(vocab, np.float32))
        self._start = hashlib.sha256(json.dumps([identity, like.model, like.profile]).encode())
        self.every = _EVERY * max(1, -(-like.nbytes // _PER))
        self._memory: OrderedDict[str, _Entry] = OrderedDict()
        self._disk: OrderedDict[str, tuple[int, int]] = OrderedDict()  # key -> tokens, bytes
        self._lengths: Counter[int] = Counter()
        self._read_once: set[str] = set()  # from the disk, and not kept in memory
        self._lock = threading.Lock()
        self._queue: Queue[tuple[str, _Entry] | None] = Queue(_BACKLOG)
        self._writer: threading.Thread | None = None
        if folder is not None and size:
            self._scan(folder)
            self._writer = threading.Thread(target=self._write_all, daemon=True, name="tmexport-cache")
            self._writer.start()

    def find(self, tokens: list[int]) -> Hit | None:
        """The longest prefix of `tokens` (which may be all of them) that has a snapshot."""
        with self._lock:
            lengths = [n for n in sorted(self._lengths) if n <= len(tokens)]
        for length, key in reversed(list(zip(lengths, self._keys(tokens, lengths), strict=True))):
            entry = self._held(key)
            if entry is not None:
                return Hit(length, entry.state.copy(), entry.logits)
            entry = self._read(key, length)
            if entry is not None and key not in self._read_once:  # to keep it too would take a copy
                self._read_once.add(key)
                return Hit(length, entry.state, entry.logits)
            if entry is not None:
                self._remember(key, entry)
                return Hit(length, entry.state.copy(), entry.logits)
        return None

    def put(self, tokens: list[int], state: State, logits: np.ndarray) -> None:
        """Keep a copy of the state and of the logits fp32 [vocab] after `tokens`."""
        if state.nbytes + logits.nbytes > self._size:
            return
        (key,) = self._keys(tokens, [len(tokens)])
        with self._lock:
            known = key in self._memory
            on_disk = key in self._disk
            if known:
                self._memory.move_to_end(key)
        if known:
            return
        entry = _Entry(len(tokens), state.copy(), logits.copy())
        self._remember(key, entry)
        if self._writer is not None and not on_disk:
            with contextlib.suppress(Full):
                self._queue.put_nowait((key, entry))

    def close(self) -> None:
        """Write what still waits for the disk."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()

    @property
    def held(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        with self._lock:
            return _nbytes(self._memory.values()), sum(size for _, size in self._disk.values())

    def _keys(self, tokens: list[int], lengths: list[int]) -> list[str]:
        data, digest, at, keys = np.asarray(tokens, "<i8").tobytes(), self._start.copy(), 0, []
        for length in lengths:
            digest.update(data[8 * at : 8 * length])
            at = length
            keys.append(digest.hexdigest())
        return keys

    def _held(self, key: str) -> _Entry | None:
        """What memory has."""
        with self._lock:
            entry = self._memory.get(key)
            if entry is not None:
                self._memory.move_to_end(key)
            return entry

    def _read(self, key: str, length: int) -> _Entry | None:
        """What the disk has."""
        with self._lock:
            on_disk = self._disk.get(key)
            if on_disk is None or on_disk[0] != length:
                return None
        assert self._folder is not None
        path = self._folder / _name(key, length)
        try:
            entry = read_snapshot(path, key, length, self.blank)
        except (OSError, ValueError):
            self._drop_file(key)
            return None
        with self._lock:
            if key in self._disk:
                self._disk.move_to_end(key)
        with contextlib.suppress(OSError):
            os.utime(path)  # the next process's order of use
        return entry

    def _remember(self, key: str, entry: _Entry) -> None:
        with self._lock:
            if key not in self._memory:
                self._lengths[entry.length] += 1
            self._memory[key] = entry
            self._memory.move_to_end(key)
            while _nbytes(self._memory.values()) > self._size:
                _, gone = self._memory.popitem(last=False)
                self._forget(gone.length)

    def _forget(self, length: int) -> None:
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]

    def _scan(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(((entry.stat(), entry.name) for entry in os.scandir(folder) if entry.is_file()), key=_age)
        except OSError as error:
            raise TmexportError(f"{folder}: cannot be a cache folder: {error.strerror or error}") from None
        for status, name in found:
            if match := _NAME.fullmatch(name):
                self._disk[match[1]] = (int(match[2]), status.st_size)
                self._lengths[int(match[2])] += 1
            elif name.endswith(".tmp") and name.startswith(".") and status.st_mtime < time.time() - _STALE:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
        self._make_room(0)

    def _make_room(self, needed: int) -> None:
        with self._lock:
            total, gone = needed + sum(size for _, size in self._disk.values()), []
            for key, (_, size) in self._disk.items():
                if total <= self._size:
                    break
                total -= size
                gone.append(key)
        for key in gone:
            self._drop_file(key)

    def _drop_file(self, key: str) -> None:
        with self._lock:
            found = self._disk.pop(key, None)
            if found is not None:
                self._forget(found[0])
            self._read_once.discard(key)
        if found is not None and self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / _name(key, found[0])).unlink()

    def _write_all(self) -> None:
        while (job := self._queue.get()) is not None:
            with contextlib.suppress(TmexportError, OSError):  # a full disk: the snapshot stays in memory
                self._write(*job)

    def _write(self, key: str, entry: _Entry) -> None:
        assert self._folder is not None
        parts: list[bytes | memoryview] = [_header(key, entry), *_buffers(entry)]
        checksum, size = 0, len(_MAGIC) + _SUM
        for part in parts:
            checksum = zlib.crc32(part, checksum)
            size += len(part)
        self._make_room(size)
        with atomic_write(self._folder / _name(key, entry.length)) as file:
            file.write(_MAGIC + checksum.to_bytes(_SUM, "little"))
            file.writelines(parts)
        with self._lock:
            if key not in self._disk:
                self._lengths[entry.length] += 1
            self._disk[key] = (entry.length, size)


def read_snapshot(path: Path, key: str, length: int, blank: _Entry) -> _Entry:
    """A snapshot's file, for a model whose states and logits look like `blank`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or another snapshot's.
    """
    like = blank.state
    arrays = {name: np.empty(like.shape_of(name, length), array.dtype) for name, array in like.arrays.items()}
    state = replace(like, arrays=arrays, tokens=length, extent=Extent(length))
    entry = _Entry(length, state, np.empty_like(blank.logits))
    header = _header(key, entry)
    with open(path, "rb", buffering=0) as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ValueError("is no snapshot")
        wanted = file.read(_SUM)
        if file.read(len(header)) != header:
            raise ValueError("is another snapshot")
        checksum = zlib.crc32(header)
        for buffer in _buffers(entry):
            for start in range(0, len(buffer), _PART):
                part = buffer[start : start + _PART]
                if file.readinto(part) != len(part):
                    raise ValueError("is cut short")
                checksum = zlib.crc32(part, checksum)
        if file.read(1) or checksum.to_bytes(_SUM, "little") != wanted:
            raise ValueError("is damaged")
    return entry


def _nbytes(entries: Iterable[_Entry]) -> int:
    """What they take in memory; arrays that grow are shared by the snapshots of one text, and count once."""
    return sum({id(array): array.nbytes for entry in entries for array in entry.arrays}.values())


def _header(key: str, entry: _Entry) -> bytes:
    arrays = [(name, array.dtype.str, array.shape) for name, array in _named(entry)]
    return json.dumps({"key": key, "tokens": entry.length, "arrays": arrays}).encode() + b"\n"


def _named(entry: _Entry) -> Iterator[tuple[str, np.ndarray]]:
    """Every array, of those that grow the positions that were read."""
    for name, array in entry.state.arrays.items():
        yield name, array[:, : entry.length] if name in entry.state.growing else array
    yield "logits", entry.logits


def _buffers(entry: _Entry) -> list[memoryview]:
    """The arrays' bytes in order: of those that grow a part for each branch."""
    parts = []
    for name, array in _named(entry):
        parts += list(array) if name in entry.state.growing else [array]
    return [part.data.cast("B") for part in parts if part.size]


def _name(key: str, length: int) -> str:
    return f"{key}-{length}.state"


def _age(entry: tuple[os.stat_result, str]) -> float:
    return entry[0].st_mtime
