"""The gated MLP (`reference.swiglu`)."""

from __future__ import annotations

from collections.abc import Callable

from runtime_ref.arithmetic import Activations
from runtime_ref.kernels.barrier import share
from runtime_ref.kernels.compiled import inlined, made_for
from runtime_ref.kernels.layers import Layer, sixteens
from runtime_ref.kernels.math import vector_silu
from runtime_ref.kernels.matmul import quantize_blocks
from runtime_ref.kernels.phases import MID, PROJ, Rows
from runtime_ref.kernels.program import Step
from runtime_ref.kernels.scratch import Room
from runtime_ref.kernels.vector import load, store
from tmexport.model.branches.mlp import SwiGLU

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba


@made_for
def gate_rows(activations: Activations) -> Callable[..., None]:
    """silu(gate) * up, as the last product reads it."""
    levels = activations.levels

    @inlined
    def body(tid, threads, job, a):
        s, width = job.s, a.block if a.block else 16
        blocks = a.k // width
        piece, end = share(job.rows * blocks, tid, threads)
        while piece < end:
            r, low = piece // blocks, piece % blocks
            count = min(end - piece, blocks - low)
            for i in range(low * width, (low + count) * width, 16):
                store(s.wide[r], i, vector_silu(load(s.proj[r], i)) * load(s.mid[r], i))
            if a.block:
                quantize_blocks(levels, s, r, low, low + count, a.block)
            piece += count

    return body


def check(branch: SwiGLU) -> None:
    """Raises GGUFError for dimensions that the kernels do not compute."""
    sixteens("d_ff", branch.d_ff)


def room(branch: SwiGLU) -> Room:
    """What its phases need of a Scratch."""
    return Room(wide=branch.d_ff, proj=branch.d_ff, mid=branch.d_ff)


SMALL = ()  # it has no small tensors


def steps(layer: Layer) -> list[Step]:
    """The MLP of one layer, from its norm to its sum.

    Raises:
        GGUFError: damaged tensors, or types that the kernels do not compute.
    """
    down = layer.matrix("down_proj")
    return [
        *layer.normed_products({"gate_proj": PROJ, "up_proj": MID}),
        Step(gate_rows(layer.preset.activations), Rows(down.k, down.block)),
        *layer.output(down),
    ]
