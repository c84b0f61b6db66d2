"""Text files -> one memory-mapped file of token ids -> batches, reproducibly.

Documents are joined into one stream, each preceded by the end-of-text token. A batch is a pure function of (seed, step),
so a resumed run is at the exact position by construction, and processes that share a batch only slice it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qat.errors import DataError
from qat.progress import progress_bar
from tmexport.errors import TokenizerError
from tmexport.files import atomic_write

SUFFIXES = (".txt", ".jsonl", ".parquet")
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenStream:
    """tokens: uint16 or uint32 [n], memory-mapped; text_bytes: UTF-8 bytes of the documents; key: names files and tokenizer."""

    tokens: np.ndarray
    text_bytes: int
    documents: int
    key: str

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, len(self.tokens))


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The text files named, and those anywhere in the folders named, in order.

    Raises:
        DataError: a path does not exist, has another suffix, or a folder holds no text.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{path}: holds no text; expected files ending in {', '.join(SUFFIXES)}")
            found += inside
        elif not path.is_file():
            raise DataError(f"{path}: no such file; expected a text, JSON Lines or Parquet file, or a folder of them")
        elif path.suffix not in SUFFIXES:
            raise DataError(f"{path}: ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    return found


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file: a .txt is one, a .jsonl or .parquet has one in each row's "text".

    Raises:
        DataError: the file is not what its suffix says (line named), or pyarrow is needed and missing.
    """
    try:
        if path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of_line(path, number, line)
        else:
            yield from _read_parquet(path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _text_of_line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is not JSON: {error}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{path}: line {number} has no string "text"; expected {{"text": "..."}} on every line')
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow; install it with: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise DataError(f'{path}: has the columns {file.schema_arrow.names}; expected one named "text"')
        for batch in file.iter_batches(columns=["text"], batch_size=1024):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file: {error}") from None


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a tokenizer.json.

    Raises:
        TokenizerError: it cannot be read, or makes ids that the model has no embedding for.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: is not a tokenizer.json: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise TokenizerError(
            f"{path}: makes token ids up to {largest}, but the model has {vocab_size} embeddings; "
            "use the tokenizer that the model was trained with"
        )
    return tokenizer


def tokenize_files(paths: Sequence[Path], tokenizer_path: Path, vocab_size: int, eos: int, cache: Path) -> TokenStream:
    """All documents of `paths` as one stream of ids, each document preceded by the end-of-text token.

    The stream is written once to `cache` under a name that depends on the files (path, size, time of change) and on the
    tokenizer, and memory-mapped from there.

    Raises:
        DataError, TokenizerError: the text or the tokenizer cannot be used.
    """
    files = find_files(paths)
    tokenizer = load_tokenizer(tokenizer_path, vocab_size)
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    key = hashlib.sha256(tokenizer_path.read_bytes() + json.dumps([stats, eos]).encode()).hexdigest()[:16]
    data_path, meta_path = cache / f"tokens-{key}.bin", cache / f"tokens-{key}.json"
    dtype = np.uint16 if vocab_size <= 65536 else np.uint32
    if not meta_path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        text_bytes = documents = count = 0
        total = sum(size for _, size, _ in stats)
        with atomic_write(data_path) as out, progress_bar("tokenising", total, unit="bytes") as bar:
            for batch in _batches(files):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    ids = np.array([eos, *encoding.ids], dtype)
                    out.write(ids.tobytes())
                    count += len(ids)
                size = sum(len(text.encode()) for text in batch)
                text_bytes, documents = text_bytes + size, documents + len(batch)
                bar.advance(size)
            if count <= documents:
                raise DataError(
                    f"{', '.join(map(str, paths))}: holds no text; expected at least one document that is not empty"
                )
        meta = {"tokens": count, "text_bytes": text_bytes, "documents": documents}
        with atomic_write(meta_path) as out:
            out.write(json.dumps(meta).encode())
    meta = json.loads(meta_path.read_text())
    tokens = np.memmap(data_path, dtype, "r", shape=(meta["tokens"],))
    return TokenStream(tokens, meta["text_bytes"], meta["documents"], key)


def _batches(files: Sequence[Path]) -> Iterator[list[str]]:
    batch: list[str] = []
    for path in files:
        for text in read_documents(path):
            if text:
                batch.append(text)
            if len(batch) == _DOCUMENTS_AT_ONCE:
                yield batch
                batch = []
    if batch:
        yield batch


@dataclass(frozen=True)
class Batches:
    """Batch number `step` of an endless seeded shuffle of windows of a stream.

    Every epoch cuts the stream into windows of seq_len + 1 tokens (neighbours share one) at its own random offset and
    visits each once in its own random order.
    """

    tokens: np.ndarray
    seq_len: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < self.seq_len + 1:
            raise DataError(
                f"the text has {len(self.tokens)} tokens; one sequence needs {self.seq_len + 1}; "
                "give more --data or a smaller --seq-len"
            )

    @property
    def windows(self) -> int:
        """Windows an epoch."""
        return max(1, (len(self.tokens) - 1) // self.seq_len - 1)

    def __call__(self, step: int) -> np.ndarray:
        """int64 [batch_size, seq_len + 1]."""
        rows = []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(index, self.windows)
            offset, order = self._epoch(epoch)
            start = offset + int(order[place]) * self.seq_len
            rows.append(self.tokens[start : start + self.seq_len + 1])
        return np.stack(rows).astype(np.int64)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        cached = self.__dict__.get("_cached")
        if cached is None or cached[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            offset = int(random.integers(len(self.tokens) - self.windows * self.seq_len))
            cached = (epoch, (offset, random.permutation(self.windows)))
            self.__dict__["_cached"] = cached
        return cached[1]
