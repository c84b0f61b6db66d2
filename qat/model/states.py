"""A recurrent state rounded after every token, simulated: what the runtime's presets `fast` (fp16) and `compact` (int8) keep.

The rules are docs/numerics.md's, with the same operations in the same order: the two differ by the rounding of exp and of sums.
A position at a time, in plain torch. Gradients pass the rounding unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.model.mamba1 import Mamba1Mixer
from qat.model.mamba2 import Mamba2Mixer

REFRESH, LEVELS, PER_LEVEL, TINY = 8, 127.0, 0.00787401574803149606, 2.0**-100


@dataclass
class Rows:
    """What is kept of rows h [..., N] before a position: h = codes * unit; position: of the next token."""

    codes: Tensor
    unit: Tensor
    position: int = 0


def advance_fp32(rows: Rows, decay: Tensor, slowest: Tensor, step: Tensor, b: Tensor) -> Tensor:
    """h = h * decay + step * b, kept as it is. decay, b: as wide as h or 1; slowest, step: one number a row."""
    rows.codes = rows.codes * decay + step[..., None] * b
    return rows.codes


def advance_fp16(rows: Rows, decay: Tensor, slowest: Tensor, step: Tensor, b: Tensor) -> Tensor:
    """As `advance_fp32`, rounded to fp16 after what is returned."""
    h = rows.codes * decay + step[..., None] * b
    rows.codes = _straight(h, h.half().float())
    return h


def advance_int8(rows: Rows, decay: Tensor, slowest: Tensor, step: Tensor, b: Tensor) -> Tensor:
    """As `advance_fp16`, in codes with a scale a row that follows a bound; what is returned is in the new unit."""
    top, unit = torch.full_like(rows.unit, LEVELS), rows.unit
    if rows.position % REFRESH == 0:
        top = rows.codes.detach().abs().amax(-1)
        unit = unit * top.clamp(max=1.0)
    largest = b.detach().abs().amax(-1)
    step = torch.where(largest < TINY, torch.zeros_like(step), step)
    bound = (unit * top) * slowest.detach() + step.detach().abs() * largest
    small = bound < TINY
    levels = torch.full_like(bound, LEVELS)  # a number over a tensor would be a reciprocal times it
    inverse = torch.where(small, 0.0, levels / torch.where(small, levels, bound))
    h = rows.codes * ((unit[..., None] * decay) * inverse[..., None]) + (step * inverse)[..., None] * b
    rows.codes, rows.unit = _straight(h, h.round()), torch.where(small, 0.0, bound * PER_LEVEL)
    return h


ADVANCE: dict[str, Callable[[Rows, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "fp32": advance_fp32,
    "fp16": advance_fp16,
    "int8": advance_int8,
}


def _straight(exact: Tensor, rounded: Tensor) -> Tensor:
    return exact + (rounded - exact).detach() if exact.requires_grad else rounded


def keep_states(model: nn.Module, kept_as: str) -> None:
    """Let every Mamba mixer of `model` keep its state in a format of ADVANCE, rounded at each position."""
    advance = ADVANCE[kept_as]
    for module in model.modules():
        if isinstance(module, Mamba2Mixer):
            module.scan = mamba2_scan(advance, kept_as)
        elif isinstance(module, Mamba1Mixer):
            module.scan = _mamba1(advance, kept_as)


def _fresh(shape: tuple[int, ...], kept_as: str, like: Tensor) -> Rows:
    unit = torch.zeros if kept_as == "int8" else torch.ones
    return Rows(like.new_zeros(shape, dtype=torch.float32), unit(shape[:-1], device=like.device))


def mamba2_scan(advance: Callable[..., Tensor], kept_as: str) -> Callable[..., tuple[Tensor, Any]]:
    """A mixer's scan, a position at a time by a rule as those of ADVANCE; the state begins as one of kept_as."""

    def scan(
        x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, chunk: int, state: Rows | None = None
    ) -> tuple[Tensor, Rows]:
        """As `qat.model.ssd.chunked_scan`; the state is Rows [batch, heads, headdim, d_state]."""
        batch, time, heads, width = x.shape
        rows = state or _fresh((batch, heads, width, b.shape[3]), kept_as, x)
        x, decay = x.float(), (dt * a).exp()
        b, c = (part.float().repeat_interleave(heads // b.shape[2], 2) for part in (b, c))
        outputs = []
        for t in range(time):
            fade = decay[:, t, :, None]
            h = advance(rows, fade[..., None], fade, dt[:, t, :, None] * x[:, t], b[:, t, :, None])
            outputs.append((h @ c[:, t, :, :, None])[..., 0] * rows.unit)
            rows.position += 1
        return torch.stack(outputs, 1) + d[:, None] * x, rows

    return scan


def _mamba1(advance: Callable[..., Tensor], kept_as: str) -> Callable[..., tuple[Tensor, Any]]:
    def scan(
        x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Rows | None
    ) -> tuple[Tensor, Rows]:
        """As `qat.model.mamba1.selective_scan`; the state is Rows [batch, channels, d_state]."""
        rows = state or _fresh((x.shape[0], *a.shape), kept_as, x)
        x, b, c, slowest, outputs = x.float(), b.float(), c.float(), a.amax(-1), []
        for t in range(x.shape[1]):
            step = dt[:, t]
            h = advance(rows, (step[..., None] * a).exp(), (step * slowest).exp(), step * x[:, t], b[:, t, None])
            outputs.append((h * c[:, t, None]).sum(-1) * rows.unit)
            rows.position += 1
        return torch.stack(outputs, 1) + d * x, rows

    return scan
