"""The phases that every model has: embedding rows, norms with the quantisation of what they give, and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from runtime_ref.arithmetic import Activations
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, made_for
from runtime_ref.kernels.isa import PRIMITIVES, Isa
from runtime_ref.kernels.matmul import embed, multiply, multiply_few, quantize_blocks, quantize_row
from runtime_ref.kernels.norm import rms_norm
from runtime_ref.kernels.packed import Packed
from runtime_ref.kernels.vector import load, splat, store

# ruff: noqa: ANN001, ANN201, ANN202 - compiled functions, typed by Numba

ONE = np.float32(1.0)
FEWEST_ROWS = 4  # from here on the code for many rows is the faster one
# Where a product writes: s.proj, added to s.x, ...
PROJ, RESIDUAL, LOGITS, MID, DT, SUM, ADD = range(7)


class Embedding(NamedTuple):
    matrix: Packed


class Norm(NamedTuple):
    """weight fp32 [d]; eps; block: activations that share a scale in the product that follows, 0 if it takes them as they
    are; number: of the block, for the report of an Inf or a NaN; last: 1 before the head, of whose rows only those are
    prepared whose logits are wanted, as the first, else 0.
    """

    weight: np.ndarray
    eps: float
    block: int
    number: int
    last: int = 0


class Rows(NamedTuple):
    """k values of a row for the next product, which quantises them in blocks as Norm says."""

    k: int
    block: int


class Added(NamedTuple):
    """bias fp32 [d], or [0] for none; multiplier, an fp32; d."""

    bias: np.ndarray
    multiplier: float
    d: int


class Scale(NamedTuple):
    """number: an fp32; d: values of a row."""

    number: float
    d: int


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
            target = r
            if a.last and job.wanted < job.rows:
                target = r // job.length if r % job.length == job.length - 1 else -1
            if target >= 0:
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
        if a.block:
            blocks = a.k // a.block
            piece, end = share(job.rows * blocks, tid, threads)
            while piece < end:
                r, low = piece // blocks, piece % blocks
                count = min(end - piece, blocks - low)
                quantize_blocks(levels, job.s, r, low, low + count, a.block)
                piece += count

    return body


@made_for
def product(isa: Isa, activations: Activations, many: bool) -> Any:
    """A matrix times the rows in s.wide."""
    if many:

        @inlined
        def body(tid, threads, job, a):
            s, out, rows = job.s, _target(job, a.target), job.wanted if a.target == LOGITS else job.rows
            multiply(isa, activations, a.matrix, s, rows, a.k, a.block, out, _adds(a.target), tid, threads)

    else:

        @inlined
        def body(tid, threads, job, a):
            s, out, rows = job.s, _target(job, a.target), job.wanted if a.target == LOGITS else job.rows
            multiply_few(isa, activations, a.matrix, s, rows, a.k, a.block, out, _adds(a.target), tid, threads)

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
    if target == DT:
        return job.s.dt
    return job.s.sum


@inlined
def _adds(target):
    return target == RESIDUAL or target == ADD  # `in` would be compiled for a list


@inlined
def add_rows(tid, threads, job, a):
    """What lies in s.sum, with the bias and times the multiplier, added to the residual stream."""
    s, factor = job.s, np.float32(a.multiplier)
    for r in range(tid, job.rows, threads):
        for i in range(0, a.d, 16):
            out = load(s.sum[r], i)
            if a.bias.shape[0]:
                out = out + load(a.bias, i)
            if factor != ONE:
                out = out * splat(factor)
            store(s.x[r], i, load(s.x[r], i) + out)


@inlined
def scale_rows(tid, threads, job, a):
    """The embedding's rows times a number."""
    s = job.s
    for r in range(tid, job.rows, threads):
        for i in range(0, a.d, 16):
            store(s.x[r], i, load(s.x[r], i) * splat(np.float32(a.number)))


@inlined
def divide_logits(tid, threads, job, a):
    """The logits divided by a number."""
    low, high = share(job.logits.shape[1], tid, threads)
    for r in range(job.wanted):
        for i in range(low, high):
            job.logits[r, i] = job.logits[r, i] / np.float32(a.number)


def ways(isa: Isa, activations: Activations) -> tuple[Any, Any]:
    """`product` for few rows and for many; the same code where the instruction set has no other way for many."""
    few, of = product(isa, activations, False), PRIMITIVES[type(isa)]
    return few, product(isa, activations, True) if of.tables or of.matrices else few
