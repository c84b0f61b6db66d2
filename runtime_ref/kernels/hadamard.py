"""What out_proj reads, turned by a Hadamard matrix (`reference.functions.hadamard`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from runtime_ref.arithmetic import Activations
from runtime_ref.kernels.compiled import inlined, made_for
from runtime_ref.kernels.matmul import quantize_row
from runtime_ref.kernels.vector import F32, LANES, load, splat, store

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba


class Hadamard(NamedTuple):
    """k: of a row; size: of the matrix, a power of two from 16; factor: over its root; block: as in `phases.Norm`."""

    k: int
    size: int
    factor: float
    block: int


@intrinsic
def _within(typingctx, vector):
    """The butterflies inside a vector: of neighbours, then of lanes 2, 4 and 8 apart."""

    def codegen(context, builder, sig, args):
        x, stride = args[0], 1
        while stride < LANES:
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane ^ stride for lane in range(LANES)])
            signs = ir.Constant(F32.llvm, [-1.0 if lane & stride else 1.0 for lane in range(LANES)])
            other = builder.shuffle_vector(x, x, lanes)
            x = builder.fadd(other, builder.fmul(x, signs))  # the second of a pair: first - second
            stride *= 2
        return x

    return F32(F32), codegen


@made_for
def hadamard_rows(activations: Activations) -> Any:
    """Each row of s.wide."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s = job.s
        for r in range(tid, job.rows, threads):
            row = s.wide[r]
            for i in range(0, a.k, 16):
                store(row, i, _within(load(row, i)))
            stride = 16
            while stride < a.size:
                for first in range(0, a.k, 2 * stride):
                    for i in range(first, first + stride, 16):
                        x, y = load(row, i), load(row, i + stride)
                        store(row, i, x + y)
                        store(row, i + stride, x - y)
                stride *= 2
            for i in range(0, a.k, 16):
                store(row, i, load(row, i) * splat(np.float32(a.factor)))
            if a.block:
                quantize_row(levels, s, r, a.k, a.block)

    return body
