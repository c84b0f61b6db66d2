"""Hadamard matrices: entries of -1 and 1, rows orthogonal; their Kronecker products are Hadamard matrices again."""

from __future__ import annotations

from functools import reduce

import numpy as np

from tmexport.errors import UsageError

_PALEY = (12, 20)  # Paley's first construction, for a prime one less that leaves 3 by 4 (11, 19)
_SYLVESTER = np.array([[1, 1], [1, -1]], np.int8)


def hadamard_matrix(size: int) -> np.ndarray:
    """int8 [size, size] of -1 and 1, for sizes that are products of 2, 12 and 20: 768 = 12 x 64, 576 = 12 x 12 x 4.

    Raises:
        UsageError: another size.
    """
    factors = _factors(size)
    if factors is None:
        raise UsageError(
            f"no Hadamard matrix of {size} is known here; expected a product of 2s, 12s and 20s, such as 768"
        )
    parts = [_SYLVESTER if factor == 2 else _paley(factor) for factor in factors]
    return reduce(np.kron, parts, np.ones((1, 1), np.int8))


def orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """fp64 [size, size]: a Hadamard matrix over the root of its size, the signs of its rows drawn.

    Raises: as hadamard_matrix.
    """
    signs = rng.choice([-1.0, 1.0], size)
    return signs[:, None] * hadamard_matrix(size) / np.sqrt(size)


def _factors(size: int) -> list[int] | None:
    """The largest first, so that few products are taken; None if there are none."""
    if size == 1:
        return []
    for factor in (*reversed(_PALEY), 2):
        if size % factor == 0 and (rest := _factors(size // factor)) is not None:
            return [factor, *rest]
    return None


def _paley(order: int) -> np.ndarray:
    """I + S for the skew matrix S of the quadratic residues modulo the prime order - 1, bordered by ones (Paley 1933)."""
    prime = order - 1
    residues = {i * i % prime for i in range(1, prime)}
    character = np.array([0] + [1 if i in residues else -1 for i in range(1, prime)], np.int8)
    skew = np.zeros((order, order), np.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    index = np.arange(prime)
    skew[1:, 1:] = character[(index[None] - index[:, None]) % prime]
    return np.eye(order, dtype=np.int8) + skew
