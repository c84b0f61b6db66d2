"""Recipe: every setting of a training run. Defaults, then a TOML file, then flags; what came of it is saved as TOML.

A recipe file has the tables [teacher] (used with --from-scratch) and [student] (used with --teacher), or those of the stages
that a hybrid goes through (qat/train/stages.py, used with --student); the keys are the fields below.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import click

from tmexport.documents import END_OF_TEXT
from tmexport.errors import UsageError
from tmexport.types import KINDS

RECIPES = files("qat") / "recipes"  # in the wheel
_FREE_ON_RESUME = {
    "minutes",
    "threads",
    "save_every",
    "allow_collapse",
    "tensorboard",
}  # these do not change what is computed
OBJECTIVES = ("predict", "align", "orient")
_KINDS: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def _setting(default: Any, text: str, low: float = -math.inf, high: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high})


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Numbers outside the bounds given with each field are refused."""

    d_model: int = _setting(256, "from scratch: width", 1)
    n_layer: int = _setting(4, "from scratch: layers", 1)
    d_state: int = _setting(64, "from scratch: state size", 1)
    headdim: int = _setting(64, "from scratch: width of a head", 1)
    expand: int = _setting(2, "from scratch: d_inner / d_model", 1)
    n_groups: int = _setting(1, "from scratch: groups of B and C", 1)
    vocab_size: int = _setting(4096, "from scratch: size of the tokenizer that is trained", 257)
    end_token: str = _setting(END_OF_TEXT, "from scratch: the token of the tokenizer that ends a text")
    weights: str = _setting(
        "ternary", f"kind of the student's weights: {', '.join(KINDS)}, or dense, to train the teacher on as a control"
    )
    group_size: int = _setting(
        0, "weights that share a scale; 0 = the widest group of their kind that fits their rows", 0, 256
    )
    projections: str = _setting("all", "which become low-bit: all, mixers (not the MLPs'), or roles: in_proj,down_proj")
    rest: str = _setting("dense", f"kind of the other projections: {', '.join(KINDS)}, or dense")
    ternary_embedding: bool = _setting(False, "train the embedding and the head ternary too")
    learned_scale: bool = _setting(
        False, "train the scales instead of recomputing them; to study the collapse it causes"
    )
    collapse_ratio: float = _setting(0.7, "a zero ratio above this that still rises stops the run", 0, 1)
    allow_collapse: bool = _setting(False, "go on when the zero ratio collapses")
    steps: int = _setting(1000, "optimiser steps", 1)
    tokens: int = _setting(0, "tokens to train on; if given, replaces --steps", 0)
    data_tokens: int = _setting(0, "read no more than about this many tokens of --data; 0 = all", 0)
    seq_len: int = _setting(256, "tokens a sequence", 1)
    batch_size: int = _setting(8, "sequences an optimiser step, over all processes", 1)
    accumulate: int = _setting(1, "parts into which a process cuts its share of the batch, to save memory", 1)
    checkpoint_activations: bool = _setting(False, "recompute each layer in the backward pass, to save memory")
    shard: bool = _setting(False, "several processes share weights, gradients and optimiser (FSDP) to save memory")
    compile: bool = _setting(False, "torch.compile the layers that train (needs a C++ compiler on a CPU)")
    lr: float = _setting(2.5e-4, "peak learning rate", 0)
    final_lr: float = _setting(0.0, "learning rate at the end, as a share of the peak", 0, 1)
    warmup: float = _setting(0.02, "share of the steps over which the learning rate rises", 0, 1)
    weight_decay: float = _setting(0.1, "decoupled weight decay, on matrices only", 0)
    beta1: float = _setting(0.9, "AdamW: decay of the mean", 0, 1)
    beta2: float = _setting(0.95, "AdamW: decay of the variance", 0, 1)
    clip: float = _setting(1.0, "largest norm of the gradient; 0 = no limit", 0)
    kd_weight: float = _setting(0.5, "w in (1 - w) CE + w T^2 KL(teacher || student)", 0, 1)
    objective: str = _setting(
        "predict",
        "what is learned: predict, tokens; align, what the teacher's layers add; orient, how its attention mixes positions",
    )
    rest_lr: float = _setting(1.0, "learning rate of all but the state-space mixers, as a share of --lr; 0 = frozen", 0)
    freeze_embedding: bool = _setting(False, "leave the embedding and the head as they are")
    refit_tokens: int = _setting(
        0, "after the last step, fit out_proj to the teacher's layers on this many tokens (of a hybrid); 0 = not", 0
    )
    align_steps: int = _setting(
        0, "first steps in which each layer imitates the teacher's layer on the teacher's input", 0
    )
    teacher_top_k: int = _setting(
        0, "ask the teacher once and keep its k best tokens on disk; 0 = ask at every step", 0
    )
    temperature: float = _setting(1.0, "T in the loss", 1e-3)
    dtype: str = _setting("float32", "compute type: float32, or bfloat16 (autocast; weights stay fp32)")
    seed: int = _setting(0, "seed of initial weights and order of the data", 0, 2**31)
    log_every: int = _setting(20, "steps between entries with the zero ratio of every layer", 1)
    eval_every: int = _setting(200, "steps between evaluations on the held-out text", 1)
    eval_tokens: int = _setting(32768, "tokens of the held-out text used for these evaluations", 1)
    save_every: int = _setting(200, "steps between checkpoints", 1)
    minutes: float = _setting(0.0, "stop after this time, whatever the steps; 0 = no limit", 0)
    threads: int = _setting(0, "CPU threads; 0 = one a core", 0)
    tensorboard: bool = _setting(False, "write the metrics to OUT/tensorboard too (needs tensorboard)")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            wanted = _KINDS[str(field.type)]
            if wanted is float and type(value) is int:
                object.__setattr__(self, field.name, value := float(value))
            if type(value) is not wanted:
                raise UsageError(f"{field.name} is {value!r}; expected a value of type {field.type}")
            low, high = field.metadata["low"], field.metadata["high"]
            if wanted in (int, float) and not low <= value <= high:
                raise UsageError(f"{field.name} is {value}; expected a number from {low:g} to {high:g}")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective is {self.objective!r}; expected {', '.join(map(repr, OBJECTIVES))}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UsageError(f"dtype is {self.dtype!r}; expected 'float32' or 'bfloat16'")
        for name, kind in (("weights", self.weights), ("rest", self.rest)):
            if kind not in (*KINDS, "dense"):
                raise UsageError(f"{name} is {kind!r}; expected {', '.join(map(repr, KINDS))} or 'dense'")
        if self.tokens:
            object.__setattr__(self, "steps", max(1, self.tokens // self.tokens_per_step))
            object.__setattr__(self, "tokens", 0)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `lr`, then a cosine down to `final_lr * lr` at the last step."""
        rise = max(1, round(self.warmup * self.steps))
        if step < rise:
            return self.lr * (step + 1) / rise
        done = (step - rise) / max(1, self.steps - 1 - rise)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def to_toml(self, table: str) -> str:
        """The recipe as the table of a recipe file."""
        lines = [f"[{table}]"]
        for field in dataclasses.fields(self):
            if field.name != "tokens":
                lines.append(f"{field.name} = {json.dumps(getattr(self, field.name))}")
        return "\n".join(lines) + "\n"


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A click decorator: one flag for every field of Recipe, None where the user gave none."""
    for field in reversed(dataclasses.fields(Recipe)):
        flag = "--" + field.name.replace("_", "-")
        kind = _KINDS[str(field.type)]
        said = field.metadata["help"]
        text = f"{said[0].upper()}{said[1:]}. Default: {str(field.default).lower()}."
        if kind is bool:
            command = click.option(f"{flag}/--no-{flag[2:]}", field.name, default=None, help=text)(command)
        else:
            flags = ("-t", flag) if field.name == "threads" else (flag,)  # -t is --threads in every command
            command = click.option(*flags, field.name, type=kind, default=None, help=text)(command)
    return command


def load_recipe(name: str | None, table: str, flags: Mapping[str, Any]) -> Recipe:
    """Defaults, then table `table` of the recipe file `name` (a path, or a name in qat/recipes), then the flags given.

    Raises:
        UsageError: no such recipe, an unknown key, or a value out of bounds.
    """
    values = {} if name is None else read_table(recipe_path(name), table)
    return with_flags(values, flags)


def recipe_path(name: str) -> Path | Traversable:
    """A file, or the recipe of this name that comes with the package."""
    return Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"


def with_flags(values: Mapping[str, Any], flags: Mapping[str, Any]) -> Recipe:
    """A recipe of these values, where a flag that was given wins."""
    values = dict(values)
    values.update({key: value for key, value in flags.items() if value is not None})
    if flags.get("steps") is not None and flags.get("tokens") is None:
        values.pop("tokens", None)
    return Recipe(**values)


def known_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(p.name.removesuffix(".toml") for p in RECIPES.iterdir() if p.name.endswith(".toml"))


def read_table(path: Path | Traversable, table: str) -> dict[str, Any]:
    """One table of a recipe file, keys checked."""
    parsed = read_tables(path)
    values = parsed.get(table)
    if not isinstance(values, dict):
        raise UsageError(f"{path}: has no table [{table}]; found {', '.join(parsed) or 'nothing'}")
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Recipe)})
    if unknown:
        raise UsageError(f"{path}: [{table}] has the unknown key {unknown[0]!r}; see --help for the settings there are")
    return values


def read_tables(path: Path | Traversable) -> dict[str, Any]:
    """All tables of a recipe file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(known_recipes())
        raise UsageError(f"{path}: no such recipe; known by name: {known}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is not a TOML file: {error}") from None


def changed_settings(saved: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Settings that matter to the result and differ from the saved run's; one that it did not know had its default."""
    now, defaults = dataclasses.asdict(recipe), dataclasses.asdict(Recipe())
    return [key for key in now if key not in _FREE_ON_RESUME and saved.get(key, defaults[key]) != now[key]]
