"""Compare a checkpoint with the GGUF that was exported from it, bit for bit where the format allows.

Codes and scales come back through decoders that share nothing with the encoders (`tmexport.types`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmexport.checkpoint import Checkpoint
from tmexport.errors import NotTernaryError
from tmexport.gguf.names import TOKENIZER_JSON_KEY, coded_kind, config_from_metadata
from tmexport.gguf.reader import GGUFFile
from tmexport.model import Model, ModelTensor
from tmexport.model.spec import NEG_EXP
from tmexport.tokenizer.gguf import export_tokenizer, has_vocabulary
from tmexport.types import GGMLType, container, decode_codes, decode_values, encode_values, first_true, tells

# A property of training code, and two that a GGUF takes from the tokenizer; every other dimension must be equal.
_NOT_COMPARED = {"chunk_size", "bos_token_id", "eos_token_id"}


@dataclass(frozen=True)
class Difference:
    """The first place where the file is not the checkpoint."""

    tensor: str
    row: int | None
    group: int | None
    expected: str
    found: str

    def __str__(self) -> str:
        place = [self.tensor]
        if self.row is not None:
            place.append(f"row {self.row}")
        if self.group is not None:
            place.append(f"group {self.group}")
        return f"{', '.join(place)}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True)
class Report:
    """What was compared: tensors and values that are equal, and the first difference if there is one."""

    ternary_tensors: int
    codes: int
    scales: int
    other_tensors: int
    difference: Difference | None


def verify_gguf(
    checkpoint: Checkpoint,
    gguf: GGUFFile,
    on_tensor: Callable[[str], None] = lambda name: None,
    tokenizer: Path | None = None,
) -> Report:
    """Compare every tensor, the dimensions and the tokenizer; stops at the first difference.

    Args:
        checkpoint: what was exported.
        gguf: the file.
        on_tensor: called with the name of each tensor that is equal.
        tokenizer: the tokenizer.json that the file must hold; None: the checkpoint's own, unless the file was written
            without one.

    Raises:
        GGUFError: the GGUF is damaged.
        CheckpointError: the checkpoint is damaged.
    """
    difference = _compare_model(checkpoint, gguf, tokenizer)
    n_ternary = n_codes = n_scales = n_other = 0
    for tensor in checkpoint.config.tensors.values() if difference is None else ():
        kind = gguf.tensors[tensor.gguf].type
        own = checkpoint.kind(tensor.hf)  # codes in blocks look like values in the file
        codes_of = own if own is not None and tells(kind, own) else coded_kind(gguf, tensor.gguf)
        if codes_of is not None:
            difference, codes, scales = _compare_codes(checkpoint, gguf, tensor, codes_of)
            n_ternary, n_codes, n_scales = n_ternary + 1, n_codes + codes, n_scales + scales
        else:
            difference = _compare_float(checkpoint, gguf, tensor, kind)
            n_other += 1
        if difference is not None:
            break
        on_tensor(tensor.gguf)
    return Report(n_ternary, n_codes, n_scales, n_other, difference)


def _compare_model(checkpoint: Checkpoint, gguf: GGUFFile, tokenizer: Path | None) -> Difference | None:
    found, expected = _flat(config_from_metadata(gguf)), _flat(checkpoint.config)
    for field in expected | found:
        if found.get(field) != expected.get(field):
            return Difference(field, None, None, repr(expected.get(field)), repr(found.get(field)))
    return _compare_tokenizer(checkpoint, gguf, tokenizer)


def _flat(model: Model) -> dict[str, object]:
    """What is compared of a model's dimensions, a value a name: those of a block that differs from others by its number."""
    flat: dict[str, object] = {}
    for name, value in model.dimensions().items():
        if name != "blocks":
            flat[name] = value
            continue
        for number, block in enumerate(value):
            for branch in block:
                flat |= {f"block {number} {branch['kind']} {key}": item for key, item in branch.items()}
    return {name: value for name, value in flat.items() if name.split(" ")[-1] not in _NOT_COMPARED}


def _compare_tokenizer(checkpoint: Checkpoint, gguf: GGUFFile, tokenizer: Path | None) -> Difference | None:
    """Every tokenizer.* key; of a file that says it takes token ids only, only where a tokenizer was asked for."""
    path = tokenizer or checkpoint.tokenizer
    if path is None or (tokenizer is None and not has_vocabulary(gguf.metadata)):
        return None
    wanted = export_tokenizer(path, checkpoint.config, checkpoint.path).metadata
    if gguf.metadata.get(TOKENIZER_JSON_KEY) != wanted[TOKENIZER_JSON_KEY]:
        return Difference("tokenizer", None, None, f"the text of {path}", "another or none")
    for key, expected in wanted.items():
        if gguf.metadata.get(key) != expected:
            return Difference(key, None, None, _shown(expected), _shown(gguf.metadata.get(key)))
    return None


def _shown(value: object) -> str:
    text = repr(value if not isinstance(value, list) else value[:4])
    return text if len(text) < 80 else text[:77] + "..."


def _compare_codes(
    checkpoint: Checkpoint, gguf: GGUFFile, tensor: ModelTensor, kind: str
) -> tuple[Difference | None, int, int]:
    target = tensor.gguf
    info = gguf.tensors[target]
    codes, scales = decode_codes(gguf.blocks(target), info.type, info.shape[-1], target)
    try:
        expected = checkpoint.codes(tensor.hf, kind)
    except NotTernaryError as error:
        return Difference(target, None, None, f"an exactly {kind} weight in the checkpoint", str(error)), 0, 0
    # Both sides at the finer of group and block, so that either may be the wider one.
    rows = _rows_in_file(tensor)
    expected_codes, step = expected.codes[rows], min(expected.group_size, info.type.block_size)
    want = np.repeat(expected.scales[rows], expected.group_size // step, axis=1)
    have = np.repeat(scales, info.type.block_size // step, axis=1)
    differs = expected_codes != codes
    if differs.any():
        row, column = first_true(differs)
        place = f"code {expected_codes[row, column]} in column {column}"
        return Difference(target, row, column // expected.group_size, place, f"{codes[row, column]}"), 0, 0
    differs = want.view(np.uint16) != have.view(np.uint16)
    if differs.any():
        row, index = first_true(differs)
        group = index * step // expected.group_size
        return Difference(target, row, group, f"scale {want[row, index]!r}", f"{have[row, index]!r}"), 0, 0
    return None, codes.size, scales.size


def _rows_in_file(tensor: ModelTensor) -> np.ndarray | slice:
    """Which row of the checkpoint each row of the file is: those of a head that RoPE turns come in pairs, half by half."""
    if tensor.rotated is None:
        return slice(None)
    place, width = np.arange(tensor.shape[0]), tensor.shape[0] // tensor.rotated
    return place // width * width + place % width // 2 + place % 2 * (width // 2)


def _compare_float(checkpoint: Checkpoint, gguf: GGUFFile, tensor: ModelTensor, kind: GGMLType) -> Difference | None:
    target = tensor.gguf
    k = gguf.tensors[target].shape[-1]
    found = decode_values(gguf.blocks(target), kind, k, target)
    expected = checkpoint.dense(tensor.hf).astype(np.float32, copy=False)
    if tensor.transform == NEG_EXP:
        expected = (-np.exp(expected.astype(np.float64))).astype(np.float32)
    expected = expected[_rows_in_file(tensor)].reshape(found.shape)
    of = container(kind)
    if of.error is not None:
        ok = np.abs(expected - found) <= of.error(expected)
    else:  # what rounding into the type gives, and nothing else
        rounded = decode_values(encode_values(expected, kind, target), kind, k, target)
        ok = rounded.view(np.uint32) == found.view(np.uint32)
    if ok.all():
        return None
    row, column = first_true(~ok)
    return Difference(target, row, None, f"{expected[row, column]!r} in column {column}", f"{found[row, column]!r}")
