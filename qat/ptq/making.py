"""From a teacher's folder to a low-bit checkpoint, by any of the methods in the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qat.data import Batches, tokenize_files
from qat.evaluate import end_of_text_id, find_tokenizer
from qat.ptq.awq import awq
from qat.ptq.gptq import gptq
from qat.ptq.rtn import round_to_nearest
from qat.ptq.sigma_delta import sigma_delta
from tmexport.checkpoint import Checkpoint, group_that_keeps, open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError, UsageError
from tmexport.types import KINDS, Coded
from tmexport.types.base import in_words


@dataclass(frozen=True)
class Method:
    """tensors: (teacher, ids int64 [n, seq_len], a key of KINDS, group size) -> the tensors of the checkpoint."""

    help: str
    tensors: Callable[..., dict[str, np.ndarray | Coded]]
    reads_text: bool


METHODS = {
    "rtn": Method("Round to nearest.", round_to_nearest, False),
    "gptq": Method("Round with error feedback by the inputs' second moments (GPTQ).", gptq, True),
    "awq": Method("Scale input channels by their activations before rounding (AWQ).", awq, True),
    "sigma-delta": Method("Carry each weight's rounding error to the next of its row.", sigma_delta, False),
}


def make(
    method: str,
    teacher: Path,
    out: Path,
    kind: str = "ternary",
    group_size: int | None = None,
    ids: Tensor | None = None,
    embedding: str = "dense",
) -> float:
    """Write the checkpoint `teacher` to `out` with every projection rounded; returns the zero ratio of the projections.

    Args:
        method: a key of METHODS.
        teacher: a full-precision checkpoint folder.
        out: folder to write, another.
        kind: a key of KINDS.
        group_size: weights that share a scale; the kind's widest if None.
        ids: calibration tokens int64 [n, seq_len], for a method that reads text.
        embedding: a key of KINDS to which the embedding and an untied head are rounded, in its widest groups; or dense.

    Raises:
        TmexportError: the teacher cannot be read, is low-bit already, or has rows that the group size does not divide.
    """
    if out.resolve() == teacher.resolve():
        raise UsageError(f"{out}: is the teacher's folder, which would be overwritten; choose another --out")
    checkpoint = open_checkpoint(teacher)
    if checkpoint.coded:
        raise CheckpointError(f"{teacher}: holds low-bit weights already; expected a full-precision teacher")
    size = _fitting(checkpoint, kind, group_size)
    tensors = METHODS[method].tensors(checkpoint, ids, kind, size)
    coded = [tensor for tensor in tensors.values() if isinstance(tensor, Coded)]
    for name, tensor in checkpoint.config.tensors.items() if embedding != "dense" else ():
        if tensor.low_bit and tensor.block is None:
            widest = KINDS[embedding].group_sizes[0]
            _check_rows(widest, [tensor.shape[1]], KINDS[embedding].group_sizes)
            tensors[name] = KINDS[embedding].quantize(_fp32(tensors[name]), widest)
    write_checkpoint(out, checkpoint.config, tensors, checkpoint.tokenizer)
    return sum(int((tensor.codes == 0).sum()) for tensor in coded) / sum(tensor.codes.size for tensor in coded)


def _fitting(checkpoint: Checkpoint, kind: str, group_size: int | None) -> int:
    """The group size asked for, or the widest that keeps what is of the kind already."""
    keeps = group_that_keeps(checkpoint, checkpoint.config.projections, kind)
    size = keeps if group_size is None else group_size
    rows = sorted({checkpoint.config.tensors[name].shape[1] for name in checkpoint.config.projections})
    _check_rows(size, rows, KINDS[kind].group_sizes)
    if size > keeps:
        raise UsageError(
            f"{checkpoint.path}: is {kind} already, in groups of {keeps}, which groups of {size} would change; "
            f"use --group-size {keeps}"
        )
    return size


def _check_rows(size: int, rows: list[int], sizes: tuple[int, ...]) -> None:
    if size not in sizes or any(length % size for length in rows):
        raise UsageError(
            f"group size {size} does not fit rows of {' and '.join(map(str, rows))}; "
            f"expected {in_words(sizes)}, and a divisor of each"
        )


def _fp32(tensor: np.ndarray | Coded) -> np.ndarray:
    return tensor.dense() if isinstance(tensor, Coded) else tensor


def calibration_ids(
    teacher: Path, data: list[Path], tokenizer: Path | None, samples: int, seq_len: int, seed: int, cache: Path
) -> Tensor:
    """Sequences of a text drawn as a training draws its first batch: int64 [samples, seq_len]."""
    config, tokenizer = open_checkpoint(teacher).config, find_tokenizer(teacher, tokenizer)
    eos = end_of_text_id(config, tokenizer)
    stream = tokenize_files(data, tokenizer, config.vocab_size, eos, cache)
    return torch.from_numpy(Batches(np.array(stream.tokens), seq_len, samples, seed)(0)[:, :-1])
