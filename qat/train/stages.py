"""The stages by which a Transformer's hybrid is made good and low-bit (MOHAWK, Bick et al. 2024, arXiv 2408.10189), as one recipe.

    [orient]    the matrices by which mixers and attention mix positions, Frobenius
    [align]     what each mixer adds on the teacher's own hidden states, relative error, all layers in one backward pass
    [distill]   KL on the logits, no label
    [ternary]   quantisation-aware training, with the hybrid that came before as the teacher

Each is a run of its own in OUT/STAGE, started from the checkpoint of the one before, so that to resume is to resume the one that
was interrupted: those before it are at their last step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.recipe import Recipe, read_table, read_tables, recipe_path, with_flags
from qat.train.hooks import Hook
from qat.train.teacher import teacher_folder
from qat.train.training import train
from tmexport.errors import UsageError

_MIXERS_ALONE = {"weights": "dense", "rest_lr": 0.0, "freeze_embedding": True, "weight_decay": 0.0, "kd_weight": 1.0}
_OF_LOW_BIT = {"weights", "group_size", "projections", "rest", "ternary_embedding", "learned_scale"}
# What a stage's table need not say
DEFAULTS: dict[str, dict[str, Any]] = {
    "orient": {**_MIXERS_ALONE, "objective": "orient"},
    "align": {**_MIXERS_ALONE, "objective": "align"},
    "distill": {**_MIXERS_ALONE, "rest_lr": 0.1},
    "ternary": {"freeze_embedding": True, "weight_decay": 0.0, "kd_weight": 1.0},
}


def load_stages(name: str, flags: Mapping[str, Any]) -> dict[str, Recipe]:
    """The stages that a recipe file has, in their order; a flag that was given counts in all of them, but that one of the low-bit
    weights only in [ternary].

    Raises:
        UsageError: no such recipe, none of the tables, an unknown key, or a value out of bounds.
    """
    path = recipe_path(name)
    found = [stage for stage in DEFAULTS if stage in read_tables(path)]
    if not found:
        raise UsageError(f"{path}: has no stage; expected a table or more of {', '.join(f'[{s}]' for s in DEFAULTS)}")
    dense = {name: value for name, value in flags.items() if name not in _OF_LOW_BIT}
    return {
        stage: with_flags({**DEFAULTS[stage], **read_table(path, stage)}, flags if stage == "ternary" else dense)
        for stage in found
    }


def train_stages(
    stages: Mapping[str, Recipe],
    data: list[Path],
    out: Path,
    teacher: Path,
    student: Path,
    held_out: list[Path] | None = None,
    tokenizer: Path | None = None,
    resume: bool = False,
    cache: Path | None = None,
    hooks: Sequence[Hook] = (),
) -> dict[str, dict[str, Any]]:
    """Run the stages in their order; the summary of each. The result is the folder of the last.

    Args:
        stages: by name, keys of DEFAULTS.
        data, held_out, tokenizer, cache, hooks: as `qat.train.training.train`; the cache is shared.
        out: gets a folder a stage.
        teacher: the Transformer: a checkpoint folder or a llama GGUF.
        student: the hybrid's checkpoint (`tmexport convert`).
        resume: go on with what is in `out`.

    Raises:
        as `train`; KeyboardInterrupt also after a stage that was complete when Ctrl-C came, and is not the last.
    """
    cache = cache or out / "cache"
    if not resume and (begun := [stage for stage in stages if (out / stage / "checkpoints" / "latest.pt").is_file()]):
        raise UsageError(f"{out / begun[0]}: already holds a run; continue it with --resume, or choose another --out")
    teacher = teacher_folder(teacher, cache)
    summaries: dict[str, dict[str, Any]] = {}
    for stage, recipe in stages.items():
        imitated = student if stage == "ternary" else teacher
        summary = train(
            recipe, data, out / stage, imitated, held_out, tokenizer, resume, cache, hooks, student, stage
        )  # fmt: skip
        summaries[stage] = summary
        if summary["stopped_by"] == "interruption" and stage != list(stages)[-1]:
            raise KeyboardInterrupt
        if summary["stopped_by"] != "steps":
            break
        student = out / stage
    return summaries
