"""Does base 3 in memory pay here? One token times a large ternary matrix, kept in two bits a weight and in base 3, in turn.

    python scripts/bench/base3.py --profile fast --threads 2

Both are the runtime's own kernels; their results are compared bit by bit first. The last line is one JSON object: billions of
multiply-adds a second, medians and best, and the median of the rounds' ratios.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import click
import numpy as np

from runtime_ref.arithmetic import PRESETS, preset_of
from runtime_ref.bench.rates import product_scratch
from runtime_ref.kernels.barrier import barrier
from runtime_ref.kernels.cache import cached
from runtime_ref.kernels.isa import select
from runtime_ref.kernels.matmul import multiply_few
from runtime_ref.kernels.packed import Packed, aligned, base3
from runtime_ref.kernels.packed.ternary import PackedTernary
from runtime_ref.team import Team
from tmexport.cli.app import run_command
from tmexport.errors import UsageError

# ruff: noqa: ANN001, ANN202 - compiled functions, typed by Numba

K, BLOCK = 2048, 256


@cached(nogil=True)
def _multiply(tid, threads, sync, isa, profile, packed, s, out):
    multiply_few(isa, profile, packed, s, 1, K, BLOCK, out, False, tid, threads)
    barrier(sync, threads)


def both(rows: int) -> dict[str, Packed]:
    """Random codes [rows, K] with scales 1 in both layouts."""
    codes = aligned((rows // 16, K // 16, 16, 4), np.dtype(np.uint8))
    fields = np.random.default_rng(0).integers(0, 3, (4, K // 16, 16, 4), np.uint8)  # the same in every tile of 16 rows
    codes[...] = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    two_bits = PackedTernary(codes, np.full((rows // 16, K // BLOCK, 16), 0x3C00, np.uint16))
    return {"two_bits": two_bits, "base3": base3.pack(two_bits, BLOCK)}


def _copy(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return copy


def measure(profile: str, rows: int, count: int, threads: int, rounds: int) -> dict[str, Any]:
    """Rates of both, and the ratio; `count` copies of the matrix are multiplied one after the other.

    Raises:
        UsageError: this CPU, or the instruction set that was chosen, has no kernel for base 3.
    """
    isa, packed = select(), both(rows)
    if not base3.suits(isa, preset_of("fast").activations, packed["two_bits"], BLOCK):
        raise UsageError(f"{type(isa).__name__} keeps no matrix of {rows} x {K} in base 3 (kernels/packed/base3.py)")
    scratch, out, team = product_scratch(1, K), np.zeros((1, rows), np.float32), Team(threads)
    scratch.low[0, :K] = np.random.default_rng(1).integers(-127, 128, K)
    scratch.high[0, :K] = scratch.low[0, :K] if profile == "exact" else 0
    scratch.q_sum[0, : K // BLOCK] = (
        (scratch.low[0, :K] + 256 * scratch.high[0, :K].astype(np.int32)).reshape(-1, BLOCK).sum(1)
    )
    scratch.q_scale[0, : K // BLOCK] = 1
    copies = {name: tuple(type(matrix)(*map(_copy, matrix)) for _ in range(count)) for name, matrix in packed.items()}
    seconds: dict[str, list[float]] = {name: [] for name in packed}
    results = {}
    try:
        for turn in range(rounds + 1):
            for name, own in copies.items():
                start = time.perf_counter()
                for matrix in own:
                    team.run(_multiply, isa, preset_of(profile).activations, matrix, scratch, out)
                seconds[name] += [time.perf_counter() - start] * (turn > 0)
                results[name] = out.tobytes()
    finally:
        team.close()
    assert results["base3"] == results["two_bits"], "the kernels differ"
    work = count * rows * K / 1e9
    rates = {name: {"median": work / median(times), "best": work / min(times)} for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["two_bits"], seconds["base3"], strict=True)]
    return {
        "profile": profile,
        "threads": threads,
        "shape": [rows, K],
        "matrices": count,
        "gmacs": rates,
        "ratio": median(ratios),
    }


@click.command()
@click.option("--profile", type=click.Choice(list(PRESETS)), default="fast", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option(
    "--rows", default=1 << 20, show_default=True, help=f"of {K} weights; the default takes 0.5 GB in two bits"
)
@click.option("--rounds", default=9, show_default=True)
def main(profile: str, threads: int, rows: int, matrices: int, rounds: int) -> None:
    """Compare the two layouts."""
    click.echo(json.dumps(measure(profile, rows // 64 * 64, matrices, threads, rounds)))


if __name__ == "__main__":
    run_command(main, "scripts/bench/base3.py")
