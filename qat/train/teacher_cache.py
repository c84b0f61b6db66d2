"""The teacher's predictions, computed once for all steps of a run and kept on disk for cheap reruns.

For every position of every batch: the k most probable tokens, their log-probabilities at the recipe's temperature, and
the logarithm of the mass of all others. Which positions there are depends only on the data, the seed and the shape of
the batches, so runs that differ in anything else (learning rate, weight of the loss, group size) share one file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qat.data import Batches
from qat.losses import TopPredictions, rows_at_once
from qat.recipe import Recipe
from qat.train.teacher import Teacher
from tmexport.cli.progress import progress_bar
from tmexport.files import atomic_write


@dataclass(frozen=True)
class TeacherCache:
    """A file of records [steps, batch, seq_len], memory-mapped: ids uint16/32 [k], log_q fp16 [k], log_tail fp32."""

    records: np.ndarray

    def __call__(self, step: int, first: int, count: int) -> TopPredictions:
        """The predictions for the sequences first .. first + count of the batch of `step`."""
        part = self.records[step, first : first + count]
        log_q = torch.from_numpy(part["log_q"].astype(np.float32))
        return TopPredictions(
            torch.from_numpy(part["ids"].astype(np.int64)), log_q, torch.from_numpy(part["log_tail"].copy())
        )


def open_teacher_cache(
    recipe: Recipe, teacher: Teacher, batches: Batches, tokens_key: str, cache: Path
) -> TeacherCache:
    """The cache of these batches and this teacher, made now if it is not there. The teacher may be on any device."""
    vocab, k = teacher.vocab_size, min(recipe.teacher_top_k, teacher.vocab_size)
    digest = hashlib.sha256(
        f"{tokens_key} {recipe.seed} {recipe.steps} {k} {recipe.temperature} {recipe.dtype}".encode()
    )
    for name, tensor in teacher.state_dict().items():
        digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    path = cache / f"teacher-{digest.hexdigest()[:16]}-{recipe.batch_size}x{recipe.seq_len}.bin"
    record = np.dtype(
        [("ids", np.uint16 if vocab <= 65536 else np.uint32, k), ("log_q", np.float16, k), ("log_tail", np.float32)]
    )
    shape = (recipe.steps, recipe.batch_size, recipe.seq_len)
    if not path.is_file():
        with atomic_write(path) as file, progress_bar("asking the teacher", recipe.steps, unit="steps") as bar:
            for step in range(recipe.steps):
                file.write(_predict(teacher, batches(step)[:, :-1], record, recipe).tobytes())
                bar.advance(1)
    return TeacherCache(np.memmap(path, record, "r", shape=shape))


@torch.no_grad()
def _predict(teacher: Teacher, ids: np.ndarray, record: np.dtype, recipe: Recipe) -> np.ndarray:
    device = teacher.head_weight.device
    out = np.empty(ids.size, record)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        hidden = teacher.hidden(torch.from_numpy(ids).to(device)).flatten(0, 1)
        rows = rows_at_once(teacher.vocab_size)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ teacher.head_weight.t()).float().div_(recipe.temperature)
            log_q = torch.log_softmax(logits, -1)
            top = log_q.topk(record["ids"].shape[0], -1)
            tail = log_q.exp_().scatter_(-1, top.indices, 0.0).sum(-1).clamp_min_(1e-12).log_()
            out["ids"][part] = top.indices.cpu().numpy()
            out["log_q"][part] = top.values.cpu().numpy()
            out["log_tail"][part] = tail.cpu().numpy()
    return out
