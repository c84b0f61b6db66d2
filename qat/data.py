"""Text files and data sets -> one memory-mapped file of token ids -> batches, reproducibly.

Documents are joined into one stream, each preceded by the end-of-text token. A batch is a pure function of (seed, step),
so a resumed run is at the exact position by construction, and processes that share a batch only slice it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from tmexport.cli.progress import progress_bar
from tmexport.documents import read_documents as read_text_documents
from tmexport.errors import TextError, TokenizerError
from tmexport.files import atomic_write

SUFFIXES = (".txt", ".jsonl", ".parquet")
DATASET = "hf:"  # before the name of a data set that the `datasets` library reads: hf:NAME[:CONFIG[:SPLIT]]
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenStream:
    """tokens: uint16 or uint32 [n], memory-mapped; text_bytes: UTF-8 bytes of the documents.

    key names the files and the tokenizer, digest the tokens themselves.
    """

    tokens: np.ndarray
    text_bytes: int
    documents: int
    key: str
    digest: str

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, len(self.tokens))


def is_dataset(path: Path) -> bool:
    """Whether this names a data set of the `datasets` library and no file."""
    return str(path).startswith(DATASET)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The text files named, and those anywhere in the folders named, in order; names of data sets as they are.

    Raises:
        TextError: a path does not exist, has another suffix, or a folder holds no text.
    """
    found: list[Path] = []
    for path in paths:
        if is_dataset(path):
            found.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise TextError(f"{path}: holds no text; expected files ending in {', '.join(SUFFIXES)}")
            found += inside
        elif not path.is_file():
            raise TextError(f"{path}: no such file; expected a text, JSON Lines or Parquet file, or a folder of them")
        elif path.suffix.lower() not in SUFFIXES:
            raise TextError(f"{path}: ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    return found


def read_documents(path: Path) -> Iterator[str]:
    """The documents of one file: a .txt is one, a .jsonl, .parquet or data set has one in each row's "text".

    Raises:
        TextError: the file is not what its suffix says (line named), or pyarrow or datasets is needed and missing.
    """
    try:
        if is_dataset(path):
            yield from _read_dataset(path)
        elif path.suffix.lower() in (".txt", ".jsonl"):
            yield from read_text_documents(path)
        else:
            yield from _read_parquet(path)
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TextError(
            f"{path}: reading Parquet needs pyarrow; install it with: pip install 'tmexport[data]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        if "text" not in file.schema_arrow.names:
            raise TextError(f'{path}: has the columns {file.schema_arrow.names}; expected one named "text"')
        for batch in file.iter_batches(columns=["text"], batch_size=1024):
            yield from (text for text in batch.column(0).to_pylist() if text)
    except (ValueError, OSError) as error:
        raise TextError(f"{path}: is not a Parquet file: {error}") from None


def _read_dataset(path: Path) -> Iterator[str]:
    """Rows as they arrive: nothing is stored before it is needed."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TextError(f"{path}: needs the datasets library; install it with: pip install 'tmexport[data]'") from None
    name, config, split, *more = *str(path).removeprefix(DATASET).split(":"), "", ""
    if not name or len(more) > 2 or any(more):
        raise TextError(
            f"{path}: is not the name of a data set; expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT"
        )
    try:
        for row in load_dataset(name, config or None, split=split or "train", streaming=True):
            text = row.get("text")
            if not isinstance(text, str):
                raise TextError(f'{path}: has the columns {list(row)}; expected a string in one named "text"')
            yield text
    except TextError:
        raise
    except Exception as error:  # of the network, of a file format, of the name: the library raises many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise TextError(f"{path}: cannot be read as a data set: {reason}") from None


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


def tokenize_files(
    paths: Sequence[Path], tokenizer_path: Path, vocab_size: int, eos: int, cache: Path, limit: int = 0
) -> TokenStream:
    """All documents of `paths` as one stream of ids, each document preceded by the end-of-text token.

    The stream is written once to `cache` under a name that depends on the files (path, size, time of change; of a data
    set the name alone), on the tokenizer and the limit, and memory-mapped from there. With a `limit`, the document that
    reaches so many tokens is the last. The tokenizers library spreads each batch of documents over all cores.

    Raises:
        TextError, TokenizerError: the text or the tokenizer cannot be used.
    """
    files = find_files(paths)
    tokenizer = load_tokenizer(tokenizer_path, vocab_size)
    named = [str(p) for p in files if is_dataset(p)]
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files if not is_dataset(p)]
    inputs = json.dumps([stats, eos, named, limit])
    key = hashlib.sha256(tokenizer_path.read_bytes() + inputs.encode()).hexdigest()[:16]
    data_path, meta_path = cache / f"tokens-{key}.bin", cache / f"tokens-{key}.json"
    dtype = np.uint16 if vocab_size <= 65536 else np.uint32
    if not meta_path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        text_bytes = documents = count = 0
        digest = hashlib.sha256()
        total = limit or (None if named else sum(size for _, size, _ in stats))
        unit = "tokens" if limit else "bytes"
        with atomic_write(data_path) as out, progress_bar("tokenising", total, unit=unit) as bar:
            for text, encoding in _encoded(files, tokenizer):
                ids = np.array([eos, *encoding.ids], dtype).tobytes()
                out.write(ids)
                digest.update(ids)
                size = len(text.encode())
                count, text_bytes, documents = count + len(encoding.ids) + 1, text_bytes + size, documents + 1
                bar.advance(len(encoding.ids) + 1 if limit else size)
                if 0 < limit <= count:
                    break
            if count <= documents:
                raise TextError(
                    f"{', '.join(map(str, paths))}: holds no text; expected at least one document that is not empty"
                )
        meta = {"tokens": count, "text_bytes": text_bytes, "documents": documents, "digest": digest.hexdigest()[:16]}
        with atomic_write(meta_path) as out:
            out.write(json.dumps(meta).encode())
    meta = json.loads(meta_path.read_text())
    tokens = np.memmap(data_path, dtype, "r", shape=(meta["tokens"],))
    return TokenStream(tokens, meta["text_bytes"], meta["documents"], key, meta["digest"])


def _encoded(files: Sequence[Path], tokenizer: Tokenizer) -> Iterator[tuple[str, Encoding]]:
    """Every document that is not empty, with its encoding."""
    texts = (text for path in files for text in read_documents(path) if text)
    while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
        yield from zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False), strict=True)


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
            raise TextError(
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
