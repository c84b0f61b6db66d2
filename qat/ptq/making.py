"""From a teacher's folder to a low-bit checkpoint, by any of the methods in the table."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.data import Batches, tokenize_files
from qat.evaluate import end_of_text_id, find_tokenizer
from qat.ptq.awq import awq
from qat.ptq.gptq import gptq
from qat.ptq.rtn import round_to_nearest
from qat.ptq.sigma_delta import sigma_delta
from qat.ptq.statistics import text_digest
from qat.ptq.transforms import TRANSFORMS, Work, apply
from tmexport.checkpoint import Checkpoint, group_that_keeps, open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError, UsageError
from tmexport.quantization import group_for, projections_of
from tmexport.types import KINDS, Coded


@dataclass(frozen=True)
class Method:
    """tensors: (teacher, ids int64 [n, seq_len], a key of KINDS, group size by projection) -> the tensors of the checkpoint."""

    help: str
    tensors: Callable[..., dict[str, np.ndarray | Coded]]
    reads_text: bool


METHODS = {
    "rtn": Method("Round to nearest.", round_to_nearest, False),
    "gptq": Method("Round with error feedback by the inputs' second moments (GPTQ).", gptq, True),
    "awq": Method("Scale input channels by their activations before rounding (AWQ).", awq, True),
    "sigma-delta": Method("Carry each weight's rounding error to the next of its row.", sigma_delta, False),
}


@dataclass(frozen=True)
class Made:
    """What `make` wrote: the zero ratio of the projections of its kind, and the record of the transformations."""

    zero_ratio: float
    transforms: tuple[dict[str, Any], ...] = ()


def make(
    method: str,
    teacher: Path,
    out: Path,
    kind: str = "ternary",
    group_size: int | None = None,
    ids: Tensor | None = None,
    embedding: str = "dense",
    projections: str = "all",
    rest: str = "dense",
    transforms: Sequence[str] = (),
    seed: int = 0,
) -> Made:
    """Write the checkpoint `teacher` to `out` with its projections rounded.

    Args:
        method: a key of METHODS.
        teacher: a full-precision checkpoint folder; for rtn with `rest`, low-bit weights that it has stay as they are.
        out: folder to write, another.
        kind: a key of KINDS.
        group_size: weights that share a scale; the kind's widest that fits if None.
        ids: calibration tokens int64 [n, seq_len], for a method or a transformation that reads text.
        embedding: a key of KINDS to which the embedding and an untied head are rounded, in its widest groups; or dense.
        projections: which become `kind` (`tmexport.quantization.projections_of`).
        rest: a key of KINDS to which the other projections are rounded to nearest; or dense.
        transforms: keys of TRANSFORMS, applied to the teacher in this order before it is rounded.
        seed: of what a transformation draws.

    Raises:
        TmexportError: the teacher cannot be read, is low-bit already, or has rows that the group size does not divide; or a
            transformation does not know the model.
    """
    if out.resolve() == teacher.resolve():
        raise UsageError(f"{out}: is the teacher's folder, which would be overwritten; choose another --out")
    checkpoint = open_checkpoint(teacher)
    kept = [name for name in checkpoint.names if checkpoint.kind(name)]
    if kept and (METHODS[method].reads_text or transforms or rest == "dense"):
        raise CheckpointError(
            f"{teacher}: holds low-bit weights already; expected a full-precision teacher, or rtn with --rest, which rounds "
            "what is not"
        )
    chosen = {name: role for name, role in projections_of(checkpoint.config, projections).items() if name not in kept}
    source: Checkpoint = checkpoint
    done: list[dict[str, Any]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".transformed-") as folder:
        if transforms:
            source, done = _transformed(checkpoint, transforms, ids, seed, Path(folder))
        groups = _groups(source, kind, group_size, chosen)
        tensors = METHODS[method].tensors(source, ids, kind, groups)
    tensors |= {name: checkpoint.codes(name) for name in kept}
    coded = [tensor for tensor in tensors.values() if isinstance(tensor, Coded)]
    for name, tensor in source.config.tensors.items():
        if name in chosen or name in kept or not tensor.low_bit:
            continue
        other = embedding if tensor.block is None else rest
        if other != "dense":
            tensors[name] = KINDS[other].quantize(_fp32(tensors[name]), group_for(other, None, name, tensor.shape[1]))
    provenance: dict[str, Any] | None = None
    if done:
        provenance = {"method": method, "transforms": done}
        if ids is not None:
            provenance["calibration"] = {"digest": text_digest(ids), "sequences": len(ids), "tokens": ids.numel()}
    write_checkpoint(out, source.config, tensors, checkpoint.tokenizer, provenance)
    zeros = sum(int((tensor.codes == 0).sum()) for tensor in coded)
    return Made(zeros / sum(tensor.codes.size for tensor in coded), tuple(done))


def _transformed(
    teacher: Checkpoint, names: Sequence[str], ids: Tensor | None, seed: int, folder: Path
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """The teacher after the transformations, as an fp32 checkpoint in `folder`, and their record."""
    unread = [name for name in names if TRANSFORMS[name].reads_text]
    if unread and ids is None:
        raise UsageError(f"--transform {unread[0]} reads calibration text; add --data")
    work = Work.of(teacher)
    apply(work, names, ids, seed)
    write_checkpoint(folder, work.config, work.rounded())
    return open_checkpoint(folder), work.done


def _groups(checkpoint: Checkpoint, kind: str, group_size: int | None, chosen: Mapping[str, str]) -> dict[str, int]:
    """The group size of each chosen projection: the one asked for, or the widest that fits and keeps what is of the kind already."""
    roles: dict[str, list[str]] = {}
    for name, role in chosen.items():
        roles.setdefault(role, []).append(name)
    groups = {}
    for names in roles.values():
        keeps = group_that_keeps(checkpoint, names, kind)
        for name in names:
            size = group_for(kind, group_size, name, checkpoint.config.tensors[name].shape[1])
            if group_size is not None and size > keeps:
                raise UsageError(
                    f"{checkpoint.path}: is {kind} already, in groups of {keeps}, which groups of {size} would change; "
                    f"use --group-size {keeps}"
                )
            groups[name] = min(size, keeps)
    return groups


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
