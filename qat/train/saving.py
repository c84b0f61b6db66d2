"""What a run keeps on disk so that it can go on: the checkpoint of the trainer, and the metrics."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.recipe import Recipe, changed_settings
from qat.train.sharding import load_whole
from tmexport.errors import UsageError
from tmexport.files import atomic_write


def save_state(
    path: Path,
    student: nn.Module,
    optimizer: Mapping[str, Any] | None,
    step: int,
    best: float,
    recipe: Recipe,
    inputs: Mapping[str, str],
) -> None:
    """Latent weights, the optimiser's state, steps done, best score so far, recipe and what was read; complete or not at all."""
    state = {"model": student.state_dict(), "step": step, "best": best, "recipe": asdict(recipe)}
    state["inputs"] = dict(inputs)
    if optimizer is not None:
        state["optimizer"] = optimizer
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_state(
    path: Path,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    inputs: Mapping[str, str],
    resume: bool,
) -> tuple[int, float]:
    """(steps done, best score so far): 0 and infinity, or what the checkpoint says, after loading it in place.

    `inputs`: digests of what the run reads, by the flag that names it; they must be those that the checkpoint holds.

    Raises:
        UsageError: there is a checkpoint but resuming was not asked for; it is damaged, or of other settings or inputs.
    """
    if not path.is_file():
        return 0, math.inf
    if not resume:
        raise UsageError(f"{path}: belongs to another run; continue that with --resume, or choose another --out")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        changed = changed_settings(saved["recipe"], recipe)
        if changed:
            raise UsageError(
                f"{path}: was made with {changed[0]} = {saved['recipe'].get(changed[0])!r}, now it is "
                f"{asdict(recipe)[changed[0]]!r}; resume with the same settings, or choose another --out"
            )
        for flag, digest in saved.get("inputs", {}).items():
            if inputs.get(flag) != digest:
                raise UsageError(
                    f"{path}: was made with another --{flag} (its content has the digest {digest}, now it is "
                    f"{inputs.get(flag, 'not given')}); resume with the same, or choose another --out"
                )
        load_whole(student, optimizer, saved["model"], saved["optimizer"])
        return saved["step"], saved["best"]
    except (
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise UsageError(
            f"{path}: is damaged or not a checkpoint of this model ({type(error).__name__}); choose another --out"
        ) from None


def trim_metrics(path: Path, steps: int) -> None:
    """Keep the entries of the first `steps` steps: the others will be done again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps]
        with atomic_write(path) as file:
            file.write("".join(lines).encode())
