"""Compare our `--type f16` with llama.cpp's own converter on the same checkpoint, tensor by tensor.

    python scripts/peers/compare_converter.py [--llama-cpp DIR] [--seed 0]

DIR is a llama.cpp source tree; without it, the sdist of llama-cpp-python is fetched with pip into a temporary folder.
The converter refuses a tokenizer it does not know by hash, so the checkpoint has none: it then takes GPT-NeoX's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import click
import numpy as np

from tests.models import random_tensors
from tests.tokenizer.real import pip_download
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli.app import run_command
from tmexport.gguf.export import plan_export
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model


def fetch_llama_cpp(folder: Path) -> Path:
    """llama.cpp's source out of llama-cpp-python's sdist."""
    with tarfile.open(pip_download("llama-cpp-python", folder, source=True)) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))


def compare(ours: Path, theirs: Path) -> dict[str, object]:
    """Tensors equal byte for byte, and the largest difference in units in the last place where they are not (ssm_a)."""
    a, b = open_gguf(ours), open_gguf(theirs)
    equal, ulps = [], {}
    for name, info in a.tensors.items():
        other = b.tensors[name]
        assert (info.shape, info.type) == (other.shape, other.type), f"{name}: {info} against {other}"
        if np.array_equal(a.blocks(name), b.blocks(name)):
            equal.append(name)
        else:
            pair = [np.ascontiguousarray(f.blocks(name)).view(np.int32).astype(np.int64) for f in (a, b)]
            ulps[name] = int(np.abs(pair[0] - pair[1]).max())
    keys = [key for key in a.metadata if key.startswith("mamba2.") and key in b.metadata]
    differing = [key for key in keys if a.metadata[key] != b.metadata[key]]
    return {
        "tensors": len(a.tensors),
        "only_theirs": sorted(set(b.tensors) - set(a.tensors)),
        "equal_bytes": len(equal),
        "ulps_where_not": ulps,
        "keys_compared": len(keys),
        "keys_differing": differing,
    }


@click.command()
@click.option("--llama-cpp", type=click.Path(path_type=Path, exists=True), help="A llama.cpp source tree.")
@click.option("--seed", default=0, show_default=True)
def main(llama_cpp: Path | None, seed: int) -> None:
    """Compare our --type f16 with llama.cpp's own converter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = llama_cpp or fetch_llama_cpp(folder)
        config = mamba2_model(d_model=768, n_layer=24, vocab_size=50288)
        write_checkpoint(folder / "ckpt", config, random_tensors(config, seed))
        command = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(folder / "ckpt"), "--outtype", "f16"]
        subprocess.run([*command, "--outfile", str(folder / "theirs.gguf")], check=True, capture_output=True)
        plan_export(open_checkpoint(folder / "ckpt"), "f16").write(folder / "ours.gguf", lambda tensor: None)
        click.echo(json.dumps(compare(folder / "ours.gguf", folder / "theirs.gguf")))


if __name__ == "__main__":
    run_command(main, "scripts/peers/compare_converter.py")
