"""A byte-level BPE tokenizer, trained on the training text (GPT-2's recipe: Radford et al. 2019)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qat.data import find_files, read_documents
from tmexport.documents import END_OF_TEXT
from tmexport.files import atomic_write


def train_tokenizer(
    paths: Sequence[Path], vocab_size: int, out: Path, limit: int = 0, end_token: str = END_OF_TEXT
) -> Path:
    """Train on the documents of `paths` and write `out`, a Hugging Face tokenizer.json; returns `out`.

    All 256 bytes are in the vocabulary, so any text can be encoded; the token that ends a text has the id 0; text is split by
    GPT-2's regular expression first. With a `limit`, the document that reaches so many characters is the last.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_documents(paths, limit), trainer)
    with atomic_write(out) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    return out


def _documents(paths: Sequence[Path], limit: int) -> Iterator[str]:
    read = 0
    for path in find_files(paths):
        for text in read_documents(path):
            yield text
            read += len(text)
            if 0 < limit <= read:
                return
