"""A checkpoint folder, read tensor by tensor; and the ternary checkpoint's reader and writer.

Three dialects (design: docs/checkpoint.md): `state-spaces/mamba2-*`, Hugging Face `Mamba2ForCausalLM`, and our ternary
form of the latter. Whatever the dialect, tensors go by their Hugging Face names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tmexport.errors import CheckpointError, NotTernaryError, ScaleError
from tmexport.files import atomic_write, file_in
from tmexport.model import Model, load_config
from tmexport.model.dialects import family_of
from tmexport.quantization import Stored, read_quantization, write_quantization
from tmexport.safetensors_io import StoredTensor
from tmexport.types import KINDS, Coded, rounded_scales, scales_per_block, widest_exact, widest_group
from tmexport.weight_files import index_folder

EMBEDDING, FINAL_NORM, LM_HEAD = "backbone.embeddings.weight", "backbone.norm_f.weight", "lm_head.weight"

BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
_AT_ONCE = 2**22  # values that are looked at together
MORE_TEMPLATES = "additional_chat_templates"  # a folder of transformers 5


def expected_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model of these dimensions, by Hugging Face name, in the order of the layers."""
    return {name: tensor.shape for name, tensor in model.tensors.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose tensors are all there with the right shapes; the data is read on demand.

    coded: how the weights of each role that is not dense are stored. `tokenizer` is the tokenizer.json, if there is one.
    round_scales: whether a dense weight that is ternary but for its scales counts as ternary, with these rounded to fp16.
    folds: by role, what its weights are multiplied by when they are read.
    """

    path: Path
    config: Model
    coded: Mapping[str, Stored]
    tokenizer: Path | None
    stored: Mapping[str, StoredTensor]
    round_scales: bool = False
    folds: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    @property
    def group_size(self) -> int | None:
        """Of the blocks' projections, where all are stored as codes in groups of one size; else None."""
        forms = {self.coded.get(self.config.tensors[name].role) for name in self.config.projections}
        form = forms.pop()
        return form.group_size if form is not None and not forms else None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.config.tensors)

    def form(self, name: str) -> Stored | None:
        """How a tensor is stored: None if it is dense."""
        return self.coded.get(self.config.tensors[name].role)

    def kind(self, name: str) -> str | None:
        """The kind of codes that a tensor is stored as: None if it is dense."""
        form = self.form(name)
        return form.kind if form is not None else None

    def codes(self, name: str, kind: str = "ternary") -> Coded:
        """The codes and scales of a weight: as stored, or of this kind read exactly from a dense tensor, in its widest groups.

        Raises:
            NotTernaryError: the dense tensor is not of this kind; a ScaleError if only its scales are in the way.
            CheckpointError: the stored codes or scales are damaged.
        """
        form = self.form(name)
        if form is None:
            return self._read_exactly(name, kind)
        known = KINDS[form.kind]
        codes = known.unpack(self.stored[name + ".codes"].read(), name)
        return known.tensor(codes, self.stored[name + ".scales"].read(), form.group_size).check(name)

    def _read(self, name: str) -> np.ndarray:
        """A dense tensor, with its family's multipliers folded in (then in fp32).

        Raises:
            CheckpointError: it holds what is no number: training diverged, or the file is damaged.
        """
        values = self.stored[name].read()
        if not all(
            np.isfinite(part).all() for part in np.array_split(values.reshape(-1), -(-values.size // _AT_ONCE) or 1)
        ):
            raise CheckpointError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")
        for factor in self.folds.get(self.config.tensors[name].role, ()):
            values = values.astype(np.float32, copy=False) * factor
        return values

    def _read_exactly(self, name: str, kind: str) -> Coded:
        weight = self._read(name)
        try:
            return widest_exact(weight, name, kind)
        except NotTernaryError as refusal:
            try:
                rounded, error = rounded_scales(weight, name, kind)
            except NotTernaryError:
                raise refusal from None
            if self.round_scales:
                return rounded
            raise ScaleError(
                f"{name}: is {kind} but for its scales, which are no fp16 numbers; --round-scales rounds them "
                f"(largest relative error {error:.1e})"
            ) from None

    def scale_error(self, name: str, kind: str = "ternary") -> float:
        """The largest relative error that rounding the scales of a dense weight to fp16 makes; 0 if there is nothing to round."""
        return 0.0 if self.form(name) is not None else rounded_scales(self._read(name), name, kind)[1]

    def values(self, name: str) -> np.ndarray:
        """A tensor as it is stored, fp16 or fp32 (bf16 arrives as fp32); codes are multiplied out. All exact."""
        return self.codes(name).dense() if self.form(name) is not None else self._read(name)

    def dense(self, name: str) -> np.ndarray:
        """A tensor in fp32, exactly."""
        return self.values(name).astype(np.float32, copy=False)


def shared_group_size(checkpoint: Checkpoint, names: Iterable[str], kind: str = "ternary") -> int:
    """The widest group for which every one of these weights is exactly of a kind: scales that agree count as one.

    Raises:
        NotTernaryError: one of them is not.
    """
    sizes = KINDS[kind].group_sizes
    widest = sizes[0]
    for name in names:
        form = checkpoint.form(name)
        if form is not None and not set(KINDS[form.kind].tensor.allowed) <= set(KINDS[kind].tensor.allowed):
            raise NotTernaryError(f"{name}: is {form.kind}, not {kind}")
        if form is not None and form.group_size == sizes[0]:
            continue
        tensor = checkpoint.codes(name, kind)
        found = next(s for s in sizes if s <= widest_group(tensor) and tensor.shape[1] % s == 0)
        widest = min(widest, found)
    return widest


def already(checkpoint: Checkpoint, name: str, kind: str) -> Coded | None:
    """A weight that is of a kind, if only up to rounding its scales to fp16 (BitNet's fp32 one), as codes; None if it is not."""
    if (checkpoint.kind(name) or kind) != kind or KINDS[kind].exact is None:
        return None
    try:
        return replace(checkpoint, round_scales=True).codes(name, kind)
    except NotTernaryError:
        return None


def group_that_keeps(checkpoint: Checkpoint, names: Iterable[str], kind: str) -> int:
    """The widest group size of a kind that keeps the scales of those weights which are of the kind already."""
    found = (already(checkpoint, name, kind) for name in names)
    return min((widest_group(tensor) for tensor in found if tensor is not None), default=KINDS[kind].group_sizes[0])


def kept(checkpoint: Checkpoint, name: str, kind: str, group_size: int) -> Coded | None:
    """What `already` finds, in groups of this size.

    Raises:
        NotTernaryError: it is of the kind in smaller groups only (see `group_that_keeps`).
    """
    tensor = already(checkpoint, name, kind)
    if tensor is None:
        return None
    return KINDS[kind].tensor(tensor.codes, scales_per_block(tensor, group_size, name), group_size)


def open_checkpoint(folder: Path | str, round_scales: bool = False) -> Checkpoint:
    """Open a checkpoint folder of any dialect and check that it holds exactly the model its config.json describes.

    round_scales: see Checkpoint.

    Raises:
        ConfigError: config.json is missing or describes something that cannot be exported.
        CheckpointError: tensors are missing, unexpected, misshapen, or a file is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; expected a checkpoint folder with config.json and weights")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder with config.json and weights")
    config, raw = load_config(folder)
    coded = read_quantization(raw, config, folder)
    stored = index_folder(folder, [*(tensor.file for tensor in config.tensors.values()), LM_HEAD])
    stored = _by_our_names(folder, config, stored)
    stored = _drop_tied_head(folder, config, stored)
    folds = family_of(config.family).folds(raw, config)
    if LM_HEAD in config.tensors and raw.get("tie_word_embeddings") is True and EMBEDDING in stored:
        stored.setdefault(LM_HEAD, stored[EMBEDDING])  # tied but for their multipliers
    _check_tensors(folder, config, coded, stored)
    folded = sorted(set(folds) & set(coded))
    if folded:
        raise CheckpointError(f"{folder}: the weights of {folded[0]} are codes, but config.json multiplies them")
    has_tokenizer = os.path.lexists(folder / "tokenizer.json")
    tokenizer = file_in(folder, "tokenizer.json") if has_tokenizer else None
    return Checkpoint(folder, config, coded, tokenizer, stored, round_scales, folds)


def write_checkpoint(
    folder: Path | str,
    config: Model,
    tensors: Mapping[str, np.ndarray | Coded],
    tokenizer: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder in the Hugging Face layout; codes with scales make it a low-bit checkpoint.

    Each file appears complete or not at all; model.safetensors comes last.

    Args:
        folder: made if it is not there.
        config: the dimensions.
        tensors: by Hugging Face name, exactly those of `expected_shapes(config)`; fp16 or fp32 arrays.
        tokenizer: a tokenizer.json to copy, with the files of BESIDE_TOKENIZER that lie beside it.
        provenance: how low-bit weights were made, for quantization_config.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or those of one role differ in kind or group size.
        TmexportError: the folder cannot be written.
    """
    from safetensors.numpy import save

    folder = Path(folder)
    flat: dict[str, np.ndarray] = {}
    shapes = expected_shapes(config)
    for name in shapes | dict.fromkeys(tensors):
        if name not in tensors or name not in shapes or tuple(tensors[name].shape) != shapes[name]:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            wanted = list(shapes[name]) if name in shapes else "no such tensor"
            raise CheckpointError(f"{folder}: {name}: found {found}, expected {wanted}")
        tensor = tensors[name]
        if isinstance(tensor, Coded):
            tensor.check(name)
            flat[name + ".codes"], flat[name + ".scales"] = KINDS[tensor.kind].pack(tensor.codes), tensor.scales
        else:
            flat[name] = np.ascontiguousarray(tensor)
    flat = _by_file_names(folder, config, flat)
    raw = config.to_hf()
    quantization = write_quantization(_stored_forms(folder, config, tensors), config, provenance)
    if quantization is not None:
        raw["quantization_config"] = quantization
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
        beside = Path(tokenizer).parent
        more = [f"{MORE_TEMPLATES}/{path.name}" for path in (beside / MORE_TEMPLATES).glob("*.jinja")]
        for name in (*BESIDE_TOKENIZER, *more):  # chat templates and end tokens, which a GGUF carries too
            if os.path.lexists(beside / name):
                (folder / name).parent.mkdir(exist_ok=True)
                _write(folder / name, file_in(beside, name).read_bytes())
    _write(folder / "config.json", (json.dumps(raw, indent=2) + "\n").encode())
    _write(folder / "model.safetensors", save(flat, metadata={"format": "pt"}))


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as file:
        file.write(data)


def _stored_forms(folder: Path, config: Model, tensors: Mapping[str, np.ndarray | Coded]) -> dict[str, Stored]:
    """How the tensors of each role are stored, which must be one way."""
    forms: dict[str, set[Stored | None]] = {}
    for name, tensor in tensors.items():
        form = Stored(tensor.kind, tensor.group_size) if isinstance(tensor, Coded) else None
        if form is not None and not config.tensors[name].low_bit:
            raise CheckpointError(
                f"{folder}: {name} is {form.kind}; expected codes for matrices that may be low-bit alone"
            )
        forms.setdefault(config.tensors[name].role, set()).add(form)
    for role, found in forms.items():
        if len(found) > 1:
            shown = sorted(f"{f.kind} in groups of {f.group_size}" if f else "dense" for f in found)
            raise CheckpointError(
                f"{folder}: the weights of {role} are {' and '.join(shown)}; expected one form for a role"
            )
    return {role: form for role, (form,) in forms.items() if form is not None}


_PARTS = ("", ".codes", ".scales")


def _by_our_names(folder: Path, config: Model, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder by the names of this program; one that holds the rows of several is taken apart."""
    found, used = {}, set()
    for name, tensor in config.tensors.items():
        which, of = tensor.part
        for suffix in _PARTS:
            whole = stored.get(tensor.file + suffix)
            if whole is None:
                continue
            used.add(tensor.file + suffix)
            if of > 1 and (whole.shape[:1] != (of * tensor.shape[0],) or whole.strides is not None):
                raise CheckpointError(
                    f"{folder}: {tensor.file + suffix} has the shape {list(whole.shape)}; "
                    f"expected {of * tensor.shape[0]} rows, one after another"
                )
            found[name + suffix] = _rows(whole, which, of)
    rest = {name: tensor for name, tensor in stored.items() if name not in used}
    return found | {name: tensor for name, tensor in rest.items() if not name.endswith("rotary_emb.inv_freq")}


def _rows(whole: StoredTensor, which: int, of: int) -> StoredTensor:
    if of == 1:
        return whole
    offset = whole.offset + whole.n_bytes // of * which
    return replace(whole, offset=offset, shape=(whole.shape[0] // of, *whole.shape[1:]))


def _by_file_names(folder: Path, config: Model, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `_by_our_names`."""
    parts: dict[str, list[np.ndarray]] = {}
    for name, tensor in config.tensors.items():
        for suffix in _PARTS:
            if name + suffix in flat:
                parts.setdefault(tensor.file + suffix, []).append(flat[name + suffix])
    of = {tensor.file: tensor.part[1] for tensor in config.tensors.values()}
    for name, arrays in parts.items():
        if len(arrays) != of[name.removesuffix(".codes").removesuffix(".scales")] or len({a.dtype for a in arrays}) > 1:
            raise CheckpointError(f"{folder}: the parts of {name} are stored in different ways; expected one")
    return {name: arrays[0] if len(arrays) == 1 else np.concatenate(arrays) for name, arrays in parts.items()}


def _drop_tied_head(folder: Path, config: Model, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """A tied head that was saved a second time must be the embedding; then it is left out."""
    if not config.tie_embeddings or LM_HEAD not in stored or EMBEDDING not in stored:
        return stored
    head, embedding = stored[LM_HEAD], stored[EMBEDDING]
    if not head.is_at(embedding) and not np.array_equal(head.read(), embedding.read()):
        raise CheckpointError(
            f"{folder}: config.json ties the head to the embedding, but {LM_HEAD} differs from it; "
            "set tie_word_embeddings to false if the head is its own"
        )
    return {name: tensor for name, tensor in stored.items() if name != LM_HEAD}


def _alike(name: str, stored: Iterable[str]) -> str:
    """The stored name that ends as a missing one does, for the message."""
    end = name.split(".", 1)[-1]
    found = [other for other in stored if other.endswith("." + end)]
    return f" (found {found[0]})" if found else ""


def _check_tensors(
    folder: Path, config: Model, coded: Mapping[str, Stored], stored: Mapping[str, StoredTensor]
) -> None:
    wanted: dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]] = {}
    for name, tensor in config.tensors.items():
        form, shape, file = coded.get(tensor.role), tensor.shape, tensor.file
        if form is not None:
            if shape[1] % form.group_size:
                raise CheckpointError(
                    f"{folder}: {file} has rows of {shape[1]}, not a multiple of the group size {form.group_size}"
                )
            packed = (shape[0], shape[1] // KINDS[form.kind].per_byte)
            wanted[name + ".codes"] = (file + ".codes", packed, ("U8",))
            wanted[name + ".scales"] = (file + ".scales", (shape[0], shape[1] // form.group_size), ("F16",))
        else:
            wanted[name] = (file, shape, ("F32", "F16", "BF16"))
    for name, (file, shape, dtypes) in wanted.items():
        if name not in stored:
            tied = "; or tie_word_embeddings true, if it is the embedding" if file == LM_HEAD else _alike(file, stored)
            raise CheckpointError(f"{folder}: {file} is missing; expected shape {list(shape)}{tied}")
        if stored[name].shape != shape or stored[name].dtype not in dtypes:
            raise CheckpointError(
                f"{folder}: {file} is {stored[name].dtype} {list(stored[name].shape)}; expected {' or '.join(dtypes)} {list(shape)}"
            )
    extra = sorted(set(stored) - set(wanted))
    if extra:
        raise CheckpointError(f"{folder}: holds {extra[0]}, which a model of these dimensions does not have")
