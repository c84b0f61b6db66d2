"""RoPE's angles as tables that are the same on every machine: docs/numerics.md, Attention.

The frequencies' sines and cosines come from 40 decimal digits; those of positions are products of two table rows in fp64,
rounded to fp32 once. No library's sin, cos or pow is asked.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np

NEAR = 64  # a position is 64 times a row of the far table plus a row of the near one
MOST_POSITIONS = 2**20  # of any text of a model with attention, whatever its file says: tables are as long
_DIGITS = 40


def context_limit(stated: int | None) -> int:
    """The positions that a text may have; stated: the model's own context length."""
    return min(stated or MOST_POSITIONS, MOST_POSITIONS)


@cache
def rope_tables(theta: float, head_dim: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """far fp64 [ceil(positions / 64), head_dim] and near [64, head_dim]: the cosines of head_dim / 2 angles, then their sines.

    Angle i of position p is p * theta^(-2 i / head_dim).
    """
    half = head_dim // 2
    first = np.array([_turn(theta, i, half) for i in range(half)]).T  # [2, half]
    near = _turns(first, NEAR)
    last = _product(near[NEAR - 1], first)  # of position 64
    far = _turns(last, -(-positions // NEAR))
    return far.reshape(len(far), head_dim), near.reshape(NEAR, head_dim)


def _turn(theta: float, i: int, half: int) -> tuple[float, float]:
    """cos and sin of theta^(-i / half), each the fp64 nearest to a value of 40 digits."""
    with localcontext() as context:
        context.prec = _DIGITS
        angle = (-(Decimal(theta).ln()) * i / half).exp()
        cos, sin, term, n = Decimal(1), Decimal(0), Decimal(1), 0
        while abs(term) > Decimal(10) ** -_DIGITS or n < 2:
            n += 1
            term = term * angle / n
            signed = term if n % 4 < 2 else -term
            if n % 2:
                sin += signed
            else:
                cos += signed
        return float(cos), float(sin)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The turns [2, half] after one another."""
    return np.stack([a[0] * b[0] - a[1] * b[1], a[1] * b[0] + a[0] * b[1]])


def _turns(step: np.ndarray, count: int) -> np.ndarray:
    """0, 1, 2, ... times a turn: fp64 [count, 2, half]."""
    found = np.empty((count, *step.shape))
    found[0] = np.stack([np.ones_like(step[0]), np.zeros_like(step[0])])
    for row in range(1, count):
        found[row] = _product(found[row - 1], step)
    return found


def angles(theta: float, head_dim: int, position: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin fp32 [head_dim / 2] of one position."""
    far, near = rope_tables(theta, head_dim, position + 1)
    half = head_dim // 2
    turned = _product(far[position // NEAR].reshape(2, half), near[position % NEAR].reshape(2, half))
    return turned[0].astype(np.float32), turned[1].astype(np.float32)
