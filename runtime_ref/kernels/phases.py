"""The phases that every model has: embedding rows, norms with the quantisation of what they give, and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.kernels.compiled import inlined, made_for
from runtime_ref.kernels.isa import PRIMITIVES, Isa
from runtime_ref.kernels.matmul import embed, multiply, multiply_few, quantize_row
from runtime_ref.kernels.norm import rms_norm
from runtime_ref.kernels.pack import Packed

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

FEWEST_ROWS = 8  # from here on the code for many rows is the faster one
PROJ, RESIDUAL, LOGITS, MID, DT = range(5)  # where a product writes: s.proj, added to s.x, ...


class Embedding(NamedTuple):
    matrix: Packed


class Norm(NamedTuple):
    """weight fp32 [d]; eps; block: activations that share a scale in the product that follows, 0 if it takes them as they
    are; number: of the block, for the report of an Inf or a NaN.
    """

    weight: np.ndarray
    eps: float
    block: int
    number: int


class Rows(NamedTuple):
    """k values of a row for the next product, which quantises them in blocks as Norm says."""

    k: int
    block: int


class Product(NamedTuple):
    """matrix [n, k]; block as in Norm; target: where the result goes."""

    matrix: Packed
    k: int
    block: int
    target: int


@inlined
def embed_rows(tid, threads, job, a):
    for r in range(tid, job.rows, threads):
        embed(a.matrix, job.tokens[r], job.s.x[r])
        job.s.bad[r] = -1


@made_for
def norm_rows(activations: Activations) -> Callable[..., None]:
    """The residual stream's norm, into s.wide."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s, d = job.s, a.weight.shape[0]
        for r in range(tid, job.rows, threads):
            if not rms_norm(s.x[r], a.weight, s.wide[r, :d], a.eps) and s.bad[r] < 0:
                s.bad[r] = a.number
            if a.block:
                quantize_row(levels, s, r, d, a.block)

    return body


@made_for
def final_norm_rows(activations: Activations) -> Callable[..., None]:
    """The norm before the head: of the rows whose logits are wanted, into the first rows of s.wide."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s, d = job.s, a.weight.shape[0]
        for r in range(tid, job.rows, threads):
            if job.wanted == job.rows or r % job.length == job.length - 1:
                target = r if job.wanted == job.rows else r // job.length
                finite = rms_norm(s.x[r], a.weight, s.wide[target, :d], a.eps)
                if a.block:
                    quantize_row(levels, s, target, d, a.block)
            else:
                finite = rms_norm(s.x[r], a.weight, s.x[r], a.eps)
            if not finite and s.bad[r] < 0:
                s.bad[r] = a.number

    return body


@made_for
def quantize_rows(activations: Activations) -> Callable[..., None]:
    """What lies in s.wide, for a product that takes it quantised."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        for r in range(tid, job.rows, threads):
            if a.block:
                quantize_row(levels, job.s, r, a.k, a.block)

    return body


@made_for
def product(isa: Isa, activations: Activations, many: bool) -> Any:
    """A matrix times the rows in s.wide."""
    if many:

        @inlined
        def body(tid, threads, job, a):
            s, out, rows = job.s, _target(job, a.target), job.wanted if a.target == LOGITS else job.rows
            multiply(isa, activations, a.matrix, s, rows, a.k, a.block, out, a.target == RESIDUAL, tid, threads)

    else:

        @inlined
        def body(tid, threads, job, a):
            s, out, rows = job.s, _target(job, a.target), job.wanted if a.target == LOGITS else job.rows
            multiply_few(isa, activations, a.matrix, s, rows, a.k, a.block, out, a.target == RESIDUAL, tid, threads)

    return body


@inlined
def _target(job, target):
    if target == PROJ:
        return job.s.proj
    if target == RESIDUAL:
        return job.s.x
    if target == LOGITS:
        return job.logits
    if target == MID:
        return job.s.mid
    return job.s.dt


def ways(isa: Isa, activations: Activations) -> tuple[Any, Any]:
    """`product` for few rows and for many; the same code where the instruction set has no other way for many."""
    few, of = product(isa, activations, False), PRIMITIVES[type(isa)]
    return few, product(isa, activations, True) if of.tables or of.matrices else few
