"""Where every tensor of a checkpoint folder lies, by its Hugging Face name: one file or shards, safetensors or torch's archive.

Names come wrapped: torch.compile, DataParallel, FSDP, PEFT and trainers put a word before a model's names, or inside them
where they wrap a part of it. Those words are dropped, and so are the words that all names begin with ("student.") and the
root ("backbone.", or "model." of another class's save), when that makes a stored name one of the model's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tmexport.errors import CheckpointError
from tmexport.files import LORA, file_in, read_text, what_it_is
from tmexport.safetensors_io import StoredTensor, index_safetensors
from tmexport.torch_bin import index_torch_bin

_LARGEST_INDEX = 2**22
_SHARD = re.compile(r"-\d+-of-\d+(?=\.(safetensors|bin)$)")
_READERS = {"model.safetensors": index_safetensors, "pytorch_model.bin": index_torch_bin}
_WRAPPERS = {"_orig_mod", "module", "base_model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROOTS = {"model", "backbone", "language_model"}
_ALIASES = {"embedding": "embeddings"}  # state-spaces/mamba2-*
_PARTS = (".codes", ".scales")
_ADAPTED = {"base_layer", "modules_to_save"}  # PEFT's, where the adapter is not merged

Index = dict[str, StoredTensor]


def index_folder(folder: Path, names: Iterable[str]) -> Index:
    """Every tensor of the folder's weights, without reading the data; those of the model by the model's own names.

    Args:
        folder: a checkpoint folder.
        names: the model's Hugging Face names.

    Raises:
        CheckpointError: there are no weights, a file is damaged or is something else, or two tensors have one name.
    """
    return _renamed(folder, _index(folder), names)


def _index(folder: Path) -> Index:
    for stem, reader in _READERS.items():
        if os.path.lexists(folder / stem):
            return _read(reader, file_in(folder, stem))
        index = f"{stem}.index.json"
        if os.path.lexists(folder / index):
            return _index_shards(folder, file_in(folder, index), reader)
    raise CheckpointError(f"{folder}: holds no weights; expected {' or '.join(_READERS)}{_instead(folder)}")


def _read(reader: Callable[[Path], Index], path: Path) -> Index:
    """The index of one file; where it cannot be read because it is something else, the error says what."""
    try:
        return reader(path)
    except CheckpointError:
        found = what_it_is(path)
        if found is None:
            raise
        raise CheckpointError(f"{path}: {found}") from None


def _instead(folder: Path) -> str:
    """What a folder without weights has in their place, for the message."""
    if any(os.path.lexists(folder / name) for name in ("adapter_model.safetensors", "adapter_model.bin")):
        return f"; it {LORA}"
    shards = sorted(name for name in os.listdir(folder) if _SHARD.search(name))
    if shards:
        return (
            f" (found the shard {shards[0]}, but not the index of the shards, {_SHARD.sub('', shards[0])}.index.json)"
        )
    suffixes = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")
    found = sorted(name for name in os.listdir(folder) if name.endswith(suffixes) or name.startswith(tuple(_READERS)))
    return f" (found {found[0]}; the weights are known by their file's name)" if found else ""


def _index_shards(folder: Path, index_path: Path, reader: Callable[[Path], Index]) -> Index:
    try:
        weight_map = json.loads(read_text(index_path, _LARGEST_INDEX))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_path}: is not a shard index with a weight_map: {error!r}") from None
    paths, merged = {}, {}
    for shard in shards:  # every name, before any file is opened
        if not isinstance(shard, str) or Path(shard).name != shard or shard.startswith("."):
            raise CheckpointError(
                f"{index_path}: names the file {shard!r}; expected a plain file name in the same folder"
            )
        paths[shard] = file_in(folder, shard)
    for shard, path in paths.items():
        for name, tensor in _read(reader, path).items():
            if name in merged or weight_map.get(name, shard) != shard:
                raise CheckpointError(
                    f"{index_path}: {name} is in {shard}, but the index or another shard has it as well; expected one place"
                )
            merged[name] = tensor
    missing = sorted(set(weight_map) - set(merged))
    if missing:
        raise CheckpointError(f"{index_path}: {missing[0]} is listed but in no shard")
    return merged


def _bare(name: str) -> tuple[str, ...]:
    """A name without its wrappers and its root: the same for every way of saving one tensor."""
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    while len(words) > 1 and words[0] in _ROOTS:
        del words[0]
    return tuple(_ALIASES.get(word, word) for word in words)


def _common(names: Iterable[str], firsts: set[str]) -> str:
    """The words that all names begin with, up to one that a name of the model can begin with."""
    words = next(iter(names), "").split(".")[:-1]
    before = ""
    while words and words[0] not in firsts | _ROOTS and all(name.startswith(f"{before}{words[0]}.") for name in names):
        before += words.pop(0) + "."
    return before


def _renamed(folder: Path, stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Index:
    """The tensors by the model's names; what is not the model's keeps its own."""
    known = {_bare(name + part): name + part for name in names for part in ("", *_PARTS)}
    before = _common(stored, {bare[0] for bare in known})
    result: Index = {}
    origin: dict[str, str] = {}
    for name, tensor in stored.items():
        if any(word.startswith("lora_") or word in _ADAPTED for word in name.split(".")):
            raise CheckpointError(f"{folder}: holds {name}: it {LORA}")
        ours = known.get(_bare(name.removeprefix(before)), name)
        if ours in result:
            raise CheckpointError(f"{folder}: {origin[ours]} and {name} are both {ours}; expected one")
        result[ours], origin[ours] = tensor, name
    return result
