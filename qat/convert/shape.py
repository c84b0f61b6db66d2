"""The hybrid's dimensions, which layers keep their attention, and what the hybrid costs; no weight is read."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from qat.plan import ACCELERATORS, UTILISATION
from tmexport.errors import UsageError
from tmexport.model import Block, Model
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.model.branches.mlp import SwiGLU
from tmexport.quantization import fitting_group
from tmexport.types import KINDS

D_CONV = 4
ALIGN_TOKENS, DISTILL_TOKENS = (
    100_000_000,
    250_000_000,
)  # what published runs of this size take; design in docs/mohawk.md
_STATED_POSITIONS = 8192


def attention_of(teacher: Model) -> Attention:
    """The one attention that all layers of a llama-like model have.

    Raises:
        UsageError: the model is not layers of attention and SwiGLU, or its heads do not fill Mamba-2's inner width.
    """
    mixers, mlps = teacher.blocks[::2], teacher.blocks[1::2]
    found = {block.branches for block in mixers}
    first = mixers[0].branches[0]
    is_llama = len(found) == 1 and isinstance(first, Attention) and len(mixers[0].branches) == 1
    if not is_llama or not all(isinstance(b, SwiGLU) for block in mlps for b in block.branches):
        raise UsageError(f"the model is a {teacher.family}; expected a Transformer of the family llama")
    assert isinstance(first, Attention)
    if 2 * teacher.d_model % (first.n_heads * first.head_dim):
        raise UsageError(
            f"{first.n_heads} heads of {first.head_dim} do not divide the mixer's {2 * teacher.d_model} channels, which "
            f"llama.cpp's granitehybrid makes twice the width {teacher.d_model}; such a model cannot be converted"
        )
    return first


def mixer_of(teacher: Model) -> Mamba2:
    """The Mamba-2 mixer that replaces the attention: B and C in a group a query head, and heads as wide as the attention's."""
    attention = attention_of(teacher)
    return Mamba2(
        teacher.d_model, 2 * teacher.d_model, attention.head_dim, D_CONV, attention.head_dim, attention.n_heads
    )


def hybrid_of(teacher: Model, kept: Collection[int]) -> Model:
    """The granitehybrid whose layers in `kept` have the teacher's attention and whose others have Mamba-2."""
    mixer = Block((mixer_of(teacher),))
    blocks = tuple(block if number % 2 or number // 2 in kept else mixer for number, block in enumerate(teacher.blocks))
    return replace(teacher, blocks=blocks, family="granitehybrid")


def kept_layers(choice: str, layers: int) -> tuple[int, ...] | int:
    """The layers that --keep names; or, for `auto`, how many of the highest rank.

    Args:
        choice: `auto` (a quarter) or `auto:N`; N, evenly spaced; or numbers from 0 with commas ("5," is layer 5 alone).
        layers: of the model.

    Raises:
        UsageError: it is none of these, or leaves no attention or no Mamba-2, which llama.cpp's granitehybrid needs both.
    """
    word, _, number = choice.partition(":")
    try:
        if word == "auto":
            count = int(number) if number else -(-layers // 4)
            _check_count(count, layers)
            return count
        if "," in choice:
            chosen = tuple(sorted({int(part) for part in choice.split(",") if part.strip()}))
            if any(not 0 <= layer < layers for layer in chosen):
                raise UsageError(f"--keep names the layers {choice}; expected numbers from 0 to {layers - 1}")
            _check_count(len(chosen), layers)
            return chosen
        count = int(choice)
    except ValueError:
        raise UsageError(f"--keep is {choice!r}; expected auto, auto:N, N or layers with commas: 0,5,9") from None
    _check_count(count, layers)
    return tuple((2 * place + 1) * layers // (2 * count) for place in range(count))


def _check_count(count: int, layers: int) -> None:
    if not 0 < count < layers:
        raise UsageError(
            f"--keep leaves attention in {count} of {layers} layers; expected 1 to {layers - 1}: llama.cpp's granitehybrid "
            "needs both kinds"
        )


@dataclass(frozen=True)
class Cost:
    """What a hybrid is and takes. Sizes in bytes; hours on one accelerator, at the share of its peak that was measured.

    groups: the widest ternary group that fits each role's rows, 0 without one. state: of one sequence, fp32, at any length; cache: keys and values of
    the kept layers, fp16, at 8,192 positions; teacher_cache: the same of the Transformer.
    """

    layers: int
    kept: tuple[int, ...]
    parameters: int
    teacher_parameters: int
    groups: dict[str, int]
    state: int
    cache: int
    teacher_cache: int
    align_hours: float
    distill_hours: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def cost_of(teacher: Model, hybrid: Model, kept: Collection[int], accelerator: str = "h100") -> Cost:
    """The sizes of a hybrid and the time that its alignment and distillation take."""
    rows = {tensor.role: tensor.shape[1] for tensor in hybrid.tensors.values() if tensor.low_bit}
    peak = ACCELERATORS[accelerator].flops * UTILISATION * 3600
    mixers = sum(
        tensor.shape[0] * tensor.shape[1]
        for tensor in hybrid.tensors.values()
        if tensor.role in ("in_proj", "out_proj")
    )
    forward, before = 2 * _parameters(hybrid), 2 * _parameters(teacher)
    return Cost(
        len(teacher.blocks) // 2,
        tuple(sorted(kept)),
        _parameters(hybrid),
        _parameters(teacher),
        {role: fitting_group(KINDS["ternary"].group_sizes, length) for role, length in rows.items()},
        4 * _state_size(hybrid, grows=False),
        2 * _STATED_POSITIONS * _state_size(hybrid, grows=True),
        2 * _STATED_POSITIONS * _state_size(teacher, grows=True),
        ALIGN_TOKENS * (before + 6 * mixers) / peak,
        DISTILL_TOKENS * (before + 3 * forward) / peak,
    )


def _parameters(model: Model) -> int:
    return sum(math.prod(tensor.shape) for tensor in model.tensors.values())


def _state_size(model: Model, grows: bool) -> int:
    states = (state for block in model.blocks for branch in block.branches for state in branch.states())
    return sum(state.size for state in states if state.grows == grows)


def describe(cost: Cost) -> str:
    """The cost as lines for a person."""
    groups: dict[int, list[str]] = {}
    for role, size in cost.groups.items():
        groups.setdefault(size, []).append(role)
    lines = [
        f"attention    kept in {len(cost.kept)} of {cost.layers} layers: {', '.join(map(str, cost.kept))}",
        f"parameters   {cost.parameters:,} (the Transformer: {cost.teacher_parameters:,})",
        f"memory       {cost.state / 1e6:.1f} MB of state at any length, and {cost.cache / 1e6:.1f} MB of keys and values at "
        f"{_STATED_POSITIONS:,} positions (the Transformer: {cost.teacher_cache / 1e6:.1f} MB)",
        *(
            f"groups       {f'of {size}' if size else 'none fits, cannot be ternary'}: {', '.join(roles)}"
            for size, roles in groups.items()
        ),
        f"to train     about {cost.align_hours:.1f} h of alignment ({ALIGN_TOKENS / 1e6:.0f}M tokens) and {cost.distill_hours:.1f} h of "
        f"distillation ({DISTILL_TOKENS / 1e6:.0f}M) on one H100, at {UTILISATION:.0%} of its bf16 peak, as measured with SmolLM2-135M on an H200",
    ]
    return "\n".join(lines)
