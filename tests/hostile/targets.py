"""What a reader does with a stranger's bytes, whole: opened, checked, every value decoded. The fuzzers' targets.

Each `accepts_*` returns whether the input was accepted. Our own typed error means no; any other exception comes out.
"""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from tests.hostile.builders import (
    CONFIG,
    dense_arrays,
    dense_config,
    safetensors_file,
    safetensors_header,
    ternary_arrays,
)
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TmexportError
from tmexport.gguf.names import config_from_metadata, group_size_of
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model
from tmexport.tokenizer.gguf import export_tokenizer
from tmexport.tokenizer.parse import parse_tokenizer
from tmexport.types import decode_values

TOKENIZER_MODEL = mamba2_model(d_model=64, n_layer=1, vocab_size=512)


def peak_bytes(action: Callable[[], object]) -> int:
    """The most memory Python and numpy held at once during `action` (memory maps do not count: they are the file)."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        action()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def accepts(read: Callable[[], object]) -> bool:
    try:
        read()
    except TmexportError as error:
        text = str(error)
        assert text.isprintable(), text
        assert 0 < len(text) < 5000, text
        return False
    return True


def read_gguf(path: Path) -> None:
    """Everything any of our programs does with a GGUF before it computes."""
    file = open_gguf(path)
    for value in file.metadata.values():
        repr(value)
    config_from_metadata(file)
    group_size_of(file)
    for name, info in file.tensors.items():
        values = decode_values(file.blocks(name), info.type, info.shape[-1], name)
        assert np.isfinite(values).all()


def accepts_gguf(path: Path) -> bool:
    return accepts(lambda: read_gguf(path))


def read_checkpoint(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    projections = set(checkpoint.config.projections)
    for name in checkpoint.names:
        if name in projections and checkpoint.group_size:
            checkpoint.codes(name)
        checkpoint.dense(name)
        checkpoint.stored.get(name)


def torch_archive(pickled: bytes, storages: dict[str, bytes]) -> bytes:
    """A torch zip archive around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
        archive.writestr("m/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"m/data/{key}", data)
        archive.writestr("m/version", "3\n")
    return buffer.getvalue()


@cache
def _parts() -> tuple[bytes, bytes, bytes, bytes, dict[str, bytes]]:
    header, data = safetensors_header(ternary_arrays())
    dense = dense_arrays()
    storages = {str(i): array.tobytes() for i, array in enumerate(dense.values())}
    dense_file = safetensors_file(*safetensors_header(dense))
    return safetensors_file(header, data), dense_file, data, json.dumps(dense_config()).encode(), storages


def accepts_checkpoint(folder: Path, data: bytes) -> bool:
    """The first byte says which file of a valid checkpoint the rest replaces."""
    which, body = (data[0] % 7 if data else 0), data[1:]
    for file in folder.iterdir():
        file.unlink()
    weights, dense_weights, data_alone, dense_config_json, storages = _parts()
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": weights}
    if which == 0:
        files["model.safetensors"] = body
    elif which == 1:  # the header alone, so that the search does not have to keep the length in step
        files["model.safetensors"] = safetensors_file(body, data_alone)
    elif which == 2:
        files["config.json"] = body
    elif which == 3:
        del files["model.safetensors"]
        files |= {"model.safetensors.index.json": body, "a.safetensors": weights}
    elif which == 6:
        files |= {"config.json": body, "model.safetensors": dense_weights}
    else:
        del files["model.safetensors"]
        files["config.json"] = dense_config_json
        files["pytorch_model.bin"] = body if which == 4 else torch_archive(body, storages)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return accepts(lambda: read_checkpoint(folder))


def accepts_tokenizer(path: Path, data: bytes) -> bool:
    """Exported as llama.cpp's keys, and loaded, used and asked for its ids as the runtime does."""
    path.write_bytes(data)

    def read() -> None:
        metadata = export_tokenizer(path, TOKENIZER_MODEL).metadata
        assert len(metadata["tokenizer.ggml.tokens"]) == TOKENIZER_MODEL.vocab_size
        tokenizer = parse_tokenizer(path.read_text(encoding="utf-8"), str(path))
        ids = tokenizer.encode("The hen\n ate 12 \u00e9clairs \u4e2d", add_special_tokens=False).ids
        assert all(0 <= i < TOKENIZER_MODEL.vocab_size for i in ids)
        tokenizer.decode(ids, skip_special_tokens=True)

    return accepts(read)
