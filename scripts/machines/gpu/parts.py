"""Files cut into parts that a call may carry, put together again, and a checkpoint cut into files that a call may bring back.

    python scripts/machines/gpu/parts.py SmolLM2-135M-Instruct.Q4_1.gguf .gpu

writes .gpu/0/part, .gpu/1/part, ... of at most 40 MiB: a folder a call.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import numpy as np
from safetensors.numpy import load_file, save_file

from tmexport.cli.app import run_command
from tmexport.errors import TmexportError
from tmexport.safetensors_io import index_safetensors

_KEPT = "embed_tokens"
CARRIED, RETURNED = 40 * 2**20, 15 * 2**20  # of 64 MiB with the working tree; of 16 MiB a file


def split(path: Path, folder: Path, size: int = CARRIED) -> int:
    """Cut a file into folder/0/part, folder/1/part, ...; how many."""
    count = 0
    with open(path, "rb") as file:
        while part := file.read(size):
            (folder / str(count)).mkdir(parents=True, exist_ok=True)
            (folder / str(count) / "part").write_bytes(part)
            count += 1
    return count


def join(folder: Path, path: Path) -> Path:
    """Put the parts together in their order.

    Raises:
        TmexportError: there is none, or one is missing between others.
    """
    numbers = sorted(int(part.parent.name) for part in folder.glob("*/part"))
    if numbers != list(range(len(numbers))) or not numbers:
        raise TmexportError(
            f"{folder}: has the parts {numbers}; expected 0, 1, 2, ...; carry each in a call of its own"
        )
    with open(path, "wb") as out:
        for number in numbers:
            out.write((folder / str(number) / "part").read_bytes())
    return path


def shards(tensors: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Tensors in files of at most `size` bytes; one that is larger alone is cut by rows, NAME:0, NAME:1, ..."""
    found: dict[str, np.ndarray] = {}
    used = 0
    for name, tensor in _pieces(tensors, size):
        if found and used + tensor.nbytes > size:
            yield found
            found, used = {}, 0
        found[name], used = tensor, used + tensor.nbytes
    if found:
        yield found


def _pieces(tensors: Mapping[str, np.ndarray], size: int) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors.items():
        count = -(-tensor.nbytes // size)
        if count <= 1:
            yield name, tensor
            continue
        for number, rows in enumerate(np.array_split(tensor, count)):
            yield f"{name}:{number}", np.ascontiguousarray(rows)


def pack_checkpoint(folder: Path, out: Path, size: int = RETURNED) -> list[Path]:
    """What a trained hybrid has of its own, in out/NAME-0.safetensors, ...: codes, scales and vectors as they are, dense matrices as
    fp16; and its config.json as NAME-config.json. `restore_checkpoint` puts it together.

    The embedding, which stays the teacher's, is left out where it is not coded.
    """
    own = {}
    for name, stored in index_safetensors(folder / "model.safetensors").items():
        tensor = stored.read()
        if name.split(".")[-2] != _KEPT:
            own[name] = tensor.astype(np.float16) if tensor.dtype == np.float32 and tensor.ndim == 2 else tensor
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "config.json", out / f"{folder.name}-config.json")
    paths = []
    for number, part in enumerate(shards(own, size)):
        paths.append(out / f"{folder.name}-{number}.safetensors")
        save_file(part, paths[-1])
    return paths


def restore_checkpoint(packed: Path, name: str, teacher: Path, out: Path) -> None:
    """The checkpoint folder `out` of the files that `pack_checkpoint` wrote of one called `name`, with the teacher's embedding.

    Raises:
        TmexportError: there are none.
    """
    paths = sorted(packed.glob(f"{name}-[0-9]*.safetensors"))
    if not paths:
        raise TmexportError(f"{packed}: has no {name}-0.safetensors; expected what pack_checkpoint wrote")
    pieces = {key: tensor for path in paths for key, tensor in load_file(path).items()}
    cut: dict[str, dict[int, np.ndarray]] = {}
    for key, tensor in pieces.items():
        whole, _, number = key.partition(":")
        cut.setdefault(whole, {})[int(number or 0)] = tensor
    tensors = {key: np.concatenate([rows[n] for n in sorted(rows)]) for key, rows in cut.items()}
    for key, stored in index_safetensors(teacher / "model.safetensors").items():
        if key.split(".")[-2] == _KEPT and f"{key}.codes" not in tensors:
            tensors[key] = stored.read()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors")
    shutil.copyfile(packed / f"{name}-config.json", out / "config.json")
    for path in teacher.iterdir():
        if path.name not in ("config.json", "model.safetensors") and path.is_file():
            shutil.copyfile(path, out / path.name)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(file: Path, folder: Path) -> None:
    """Cut FILE into parts in FOLDER."""
    count = split(file, folder)
    click.echo(f"{folder}: {count} parts; carry {', '.join(f'{folder}/{n}' for n in range(count))}, one a call")


if __name__ == "__main__":
    run_command(main, "python scripts/machines/gpu/parts.py")
