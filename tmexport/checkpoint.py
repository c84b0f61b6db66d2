"""A checkpoint folder, read tensor by tensor; and the ternary checkpoint's reader and writer.

Three dialects (design: docs/checkpoint.md): `state-spaces/mamba2-*`, Hugging Face `Mamba2ForCausalLM`, and our ternary
form of the latter. Whatever the dialect, tensors go by their Hugging Face names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmexport.errors import CheckpointError
from tmexport.files import atomic_write, file_in, read_text
from tmexport.model import Model, load_config
from tmexport.safetensors_io import StoredTensor, index_safetensors
from tmexport.ternary import GROUP_SIZES, TernaryTensor, pack_codes, unpack_codes, widest_exact
from tmexport.torch_bin import index_torch_bin

FORMAT_VERSION = 1
_LARGEST_INDEX = 2**22
EMBEDDING, FINAL_NORM, LM_HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"
_STATE_SPACES_EMBEDDING = "backbone.embedding.weight"


def projection_names(model: Model) -> list[str]:
    """The weights that are ternary in a ternary checkpoint, in the order of the layers."""
    return list(model.projections)


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of these dimensions, by Hugging Face name, in the order of the layers."""
    return {name: tensor.shape for name, tensor in model.tensors.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors are all there with the right shapes; the data is read on demand.

    group_size is None unless the folder is a ternary checkpoint. `tokenizer` is the tokenizer.json, if there is one.
    """

    path: Path
    config: Model
    group_size: int | None
    tokenizer: Path | None
    stored: Mapping[str, StoredTensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expected_shapes(self.config))

    def is_stored_ternary(self, name: str) -> bool:
        return name + ".codes" in self.stored

    def ternary(self, name: str) -> TernaryTensor:
        """The codes and scales of a weight: as stored, or read exactly from a dense tensor with the widest group.

        Raises:
            NotTernaryError: the dense tensor is not ternary in groups.
            CheckpointError: the stored codes or scales are damaged.
        """
        if not self.is_stored_ternary(name):
            return widest_exact(self.stored[name].read(), name)
        assert self.group_size is not None
        codes = unpack_codes(self.stored[name + ".codes"].read(), name)
        return TernaryTensor(codes, self.stored[name + ".scales"].read(), self.group_size).check(name)

    def values(self, name: str) -> np.ndarray:
        """A tensor as it is stored, fp16 or fp32 (bf16 arrives as fp32); a ternary weight is dequantised. All exact."""
        if self.is_stored_ternary(name):
            return self.ternary(name).dense()
        return self.stored[name].read()

    def dense(self, name: str) -> np.ndarray:
        """A tensor in fp32, exactly."""
        return self.values(name).astype(np.float32, copy=False)


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Open a checkpoint folder of any dialect and check that it holds exactly the model its config.json describes.

    Raises:
        ConfigError: config.json is missing or describes something that cannot be exported.
        CheckpointError: tensors are missing, unexpected, misshapen, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder with config.json and weights")
    config, raw = load_config(folder)
    group_size = _group_size(folder, raw)
    stored = _index(folder)
    if _STATE_SPACES_EMBEDDING in stored:
        stored[EMBEDDING] = stored.pop(_STATE_SPACES_EMBEDDING)
    stored = _drop_tied_head(folder, config, stored)
    _check_tensors(folder, config, group_size, stored)
    has_tokenizer = os.path.lexists(folder / "tokenizer.json")
    tokenizer = file_in(folder, "tokenizer.json") if has_tokenizer else None
    return Checkpoint(folder, config, group_size, tokenizer, stored)


def write_checkpoint(
    folder: Path | str,
    config: Model,
    tensors: Mapping[str, np.ndarray | TernaryTensor],
    tokenizer: Path | None = None,
) -> None:
    """Write a checkpoint folder in the Hugging Face layout; TernaryTensors make it a ternary checkpoint.

    Each file appears complete or not at all; model.safetensors comes last.

    Args:
        folder: made if it is not there.
        config: the dimensions.
        tensors: by Hugging Face name, exactly those of `expected_shapes(config)`; fp16 or fp32 arrays.
        tokenizer: a tokenizer.json to copy.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or ternary ones differ in group size.
        TmexportError: the folder cannot be written.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    flat: dict[str, np.ndarray] = {}
    group_sizes = {tensor.group_size for tensor in tensors.values() if isinstance(tensor, TernaryTensor)}
    if len(group_sizes) > 1:
        raise CheckpointError(f"{folder}: ternary weights have group sizes {sorted(group_sizes)}; expected one")
    shapes = expected_shapes(config)
    for name in shapes | dict.fromkeys(tensors):
        if name not in tensors or name not in shapes or tuple(tensors[name].shape) != shapes[name]:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            wanted = list(shapes[name]) if name in shapes else "no such tensor"
            raise CheckpointError(f"{folder}: {name}: found {found}, expected {wanted}")
        tensor = tensors[name]
        if isinstance(tensor, TernaryTensor):
            tensor.check(name)
            flat[name + ".codes"], flat[name + ".scales"] = pack_codes(tensor.codes), tensor.scales
        else:
            flat[name] = np.ascontiguousarray(tensor)
    raw = config.to_hf()
    if group_sizes:
        raw["quantization_config"] = {
            "quant_method": "ternary",
            "group_size": group_sizes.pop(),
            "version": FORMAT_VERSION,
        }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror}") from None
    if tokenizer is not None and Path(tokenizer) != folder / "tokenizer.json":
        try:
            text = Path(tokenizer).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{tokenizer}: cannot be read: {error.strerror}") from None
        _write(folder / "tokenizer.json", text)
    _write(folder / "config.json", (json.dumps(raw, indent=2) + "\n").encode())
    _write(folder / "model.safetensors", save(flat, metadata={"format": "pt"}))


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def _group_size(folder: Path, raw: Mapping[str, object]) -> int | None:
    quantization = raw.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "ternary":
        raise CheckpointError(
            f"{folder}: quantization_config is {quantization!r}; expected none, or quant_method 'ternary'"
        )
    if quantization.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: ternary checkpoint version {quantization.get('version')!r}; this release reads {FORMAT_VERSION}; "
            "install a newer tmexport"
        )
    if quantization.get("group_size") not in GROUP_SIZES:
        raise CheckpointError(f"{folder}: group_size is {quantization.get('group_size')!r}; expected 64, 128 or 256")
    return quantization["group_size"]


def _index(folder: Path) -> dict[str, StoredTensor]:
    """Where every tensor lies, whichever way the weights are split over files."""
    for stem, reader in (("model.safetensors", index_safetensors), ("pytorch_model.bin", index_torch_bin)):
        if os.path.lexists(folder / stem):
            return reader(file_in(folder, stem))
        index = f"{stem}.index.json"
        if os.path.lexists(folder / index):
            return _index_shards(folder, file_in(folder, index), reader)
    raise CheckpointError(f"{folder}: holds no weights; expected model.safetensors or pytorch_model.bin")


def _index_shards(folder: Path, index_path: Path, reader: object) -> dict[str, StoredTensor]:
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
        for name, tensor in reader(path).items():  # type: ignore[operator]
            if name in merged or weight_map.get(name, shard) != shard:
                raise CheckpointError(
                    f"{index_path}: {name} is in {shard}, but the index or another shard has it as well; expected one place"
                )
            merged[name] = tensor
    missing = sorted(set(weight_map) - set(merged))
    if missing:
        raise CheckpointError(f"{index_path}: {missing[0]} is listed but in no shard")
    return merged


def _drop_tied_head(folder: Path, config: Model, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A tied head that was saved a second time must be the embedding; then it is left out."""
    if not config.tie_embeddings or LM_HEAD not in stored or EMBEDDING not in stored:
        return stored
    head, embedding = stored[LM_HEAD], stored[EMBEDDING]
    same_place = (head.path, head.offset, head.shape) == (embedding.path, embedding.offset, embedding.shape)
    if not same_place and not np.array_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but {LM_HEAD} differs from it; "
            "set tie_word_embeddings to false if the head is its own"
        )
    return {name: tensor for name, tensor in stored.items() if name != LM_HEAD}


def _check_tensors(folder: Path, config: Model, group_size: int | None, stored: Mapping[str, StoredTensor]) -> None:
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    projections = set(projection_names(config)) if group_size else set()
    for name, shape in expected_shapes(config).items():
        if name in projections and group_size:
            if shape[1] % group_size:
                raise CheckpointError(
                    f"{folder}: {name} has rows of {shape[1]}, not a multiple of the group size {group_size}"
                )
            wanted[name + ".codes"] = ((shape[0], shape[1] // 4), ("U8",))
            wanted[name + ".scales"] = ((shape[0], shape[1] // group_size), ("F16",))
        else:
            wanted[name] = (shape, ("F32", "F16", "BF16"))
    for name, (shape, dtypes) in wanted.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: {name} is missing; expected shape {list(shape)}")
        if stored[name].shape != shape or stored[name].dtype not in dtypes:
            raise CheckpointError(
                f"{folder}: {name} is {stored[name].dtype} {list(stored[name].shape)}; expected {' or '.join(dtypes)} {list(shape)}"
            )
    extra = sorted(set(stored) - set(wanted))
    if extra:
        raise CheckpointError(f"{folder}: holds {extra[0]}, which a model of these dimensions does not have")
