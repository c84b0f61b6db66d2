"""Would TQ1_0 decode quicker if it stayed in base 3 in memory? The inner loop both ways, on this CPU.

    python scripts/bench/base3.py --profile exact

Two kernels multiply the same ternary matrix and one row of int8 activation planes, without scales: one reads 2 bits a
weight, as the runtime packs them, one reads base 3 (5 weights a byte, a digit taken by comparing, as TQ1_0 allows). Both
are checked against numpy's integers. Rounds alternate; medians. The last line is one JSON object.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import click
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from runtime_ref.kernels.isa import PRIMITIVES, select
from runtime_ref.kernels.packed import aligned
from runtime_ref.kernels.tiles import AHEAD, ROWS
from runtime_ref.kernels.vector import address, ask_for_line
from tmexport.cli.app import run_command

K = 3840  # 15 blocks of 256 columns (16 steps of 16), or 16 of 240 (12 steps of 20)
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def _kernel(base: int, planes: int) -> Any:
    words, steps = (4, 16) if base == 2 else (5, 12)  # words of 4 columns a step, steps a block
    blocks = K // (4 * words * steps)

    @intrinsic
    def tile(typingctx, isa, codes, q, out):  # noqa: ANN001, ANN202 - the signature is Numba's
        """int32 [16] sums of a tile at address `codes` times planes [K] int8 at address `q`, one after the other."""
        primitives = PRIMITIVES[isa.instance_class]
        lanes, dot, total = primitives.lanes, primitives.bytes.dot, primitives.bytes.total
        parts = ROWS // lanes
        ints, bytes_ = ir.VectorType(I32, lanes), ir.VectorType(I8, 4 * lanes)

        def same(kind: ir.VectorType, value: int) -> ir.Constant:
            return ir.Constant(kind, [value] * kind.count)

        def digits(b: ir.IRBuilder, raw: ir.Value) -> list[ir.Value]:
            if base == 2:
                shifted = [b.lshr(raw, same(ints, 2 * word)) for word in range(words)]
                return [b.and_(value, same(ints, 0x03030303)) for value in shifted]
            found, value = [], b.bitcast(raw, bytes_)
            for _ in range(words):  # value / 256 is a fraction: its next digit is the whole part of 3 times it
                two = b.zext(b.icmp_unsigned(">=", value, same(bytes_, 171)), bytes_)
                one = b.zext(b.icmp_unsigned(">=", value, same(bytes_, 86)), bytes_)
                found.append(b.bitcast(b.add(one, two), ints))
                value = b.add(value, b.add(value, value))
            return found

        def codegen(context, builder, sig, args):  # noqa: ANN001, ANN202
            b = builder

            def pointer(at: ir.Value) -> ir.Value:
                return b.inttoptr(at, I8.as_pointer())

            codes_at, q_at, out_at = (pointer(a) for a in args[1:])
            totals = [b.alloca(ints) for _ in range(parts)]
            for slot in totals:
                b.store(ir.Constant(ints, None), slot)
            start, inner, block_end, end = (b.append_basic_block() for _ in range(4))
            before = b.block
            b.branch(start)
            b.position_at_end(start)
            block = b.phi(I64)
            block.add_incoming(ir.Constant(I64, 0), before)
            b.branch(inner)
            b.position_at_end(inner)
            step = b.phi(I64)
            step.add_incoming(ir.Constant(I64, 0), start)
            sums = [b.phi(primitives.bytes.sums) for _ in range(planes * parts)]
            carried = list(sums)
            for phi in sums:
                phi.add_incoming(ir.Constant(phi.type, None), start)
            index = b.add(b.mul(block, ir.Constant(I64, steps)), step)
            at = b.gep(codes_at, [b.mul(index, ir.Constant(I64, 4 * ROWS))])
            ask_for_line(b, b.gep(at, [ir.Constant(I64, AHEAD)]))
            fields = []
            for part in range(parts):
                place = b.gep(at, [ir.Constant(I64, 4 * lanes * part)])
                fields.append(digits(b, b.load(b.bitcast(place, ints.as_pointer()), align=4)))
            for plane in range(planes):
                offset = b.add(b.mul(index, ir.Constant(I64, 4 * words)), ir.Constant(I64, K * plane))
                activations = b.gep(q_at, [offset])
                for word in range(words):
                    here = b.gep(activations, [ir.Constant(I64, 4 * word)])
                    q = primitives.bytes.words(b, here, 0)
                    for part in range(parts):
                        at_sum = plane * parts + part
                        carried[at_sum] = dot(b, carried[at_sum], fields[part][word], q, 0)
            following = b.add(step, ir.Constant(I64, 1))
            step.add_incoming(following, b.block)
            for phi, value in zip(sums, carried, strict=True):
                phi.add_incoming(value, b.block)
            b.cbranch(b.icmp_signed("<", following, ir.Constant(I64, steps)), inner, block_end)
            b.position_at_end(block_end)
            for at_sum, value in enumerate(carried):
                plane, part = divmod(at_sum, parts)
                more = total(b, value, 8 * plane)
                b.store(b.add(b.load(totals[part]), more), totals[part])
            following = b.add(block, ir.Constant(I64, 1))
            block.add_incoming(following, b.block)
            b.cbranch(b.icmp_signed("<", following, ir.Constant(I64, blocks)), start, end)
            b.position_at_end(end)
            for part, slot in enumerate(totals):
                place = b.gep(out_at, [ir.Constant(I64, 4 * lanes * part)])
                b.store(b.load(slot), b.bitcast(place, ints.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(isa, *[types.int64] * 3), codegen

    @njit
    def multiply(isa, codes, q, out):  # noqa: ANN001, ANN202
        for index in range(codes.shape[0]):
            tile(isa, address(codes[index]), address(q), address(out[index]))

    return multiply


def _pack(codes: np.ndarray, base: int) -> np.ndarray:
    """uint8 codes 0..2 [rows, K] -> [tiles, steps, 16 rows, 4 bytes]; base 3: the byte is ceil(number * 256 / 243)."""
    words = 4 if base == 2 else 5
    fields = codes.reshape(-1, ROWS, K // (4 * words), words, 4).astype(np.uint16)
    value: Any
    if base == 2:
        value = sum(fields[:, :, :, word] << (2 * word) for word in range(words))
    else:
        number = sum(fields[:, :, :, word] * 3 ** (4 - word) for word in range(words))
        value = (number.astype(np.uint32) * 256 + 242) // 243
    packed = aligned((codes.shape[0] // ROWS, K // (4 * words), ROWS, 4), np.dtype(np.uint8))
    packed[...] = value.transpose(0, 2, 1, 3)
    return packed


@click.command()
@click.option("--profile", type=click.Choice(["exact", "fast"]), default="exact", show_default=True)
@click.option("--rounds", default=15, show_default=True, help="timed runs of each")
def main(profile: str, rounds: int) -> None:
    """Time both, in cache and from memory."""
    rng, isa = np.random.default_rng(0), select()
    planes = 2 if profile == "exact" else 1
    result: dict[str, object] = {"profile": profile, "isa": type(isa).__name__.lower(), "bytes_ratio": 4 / 5}
    kernels = {base: _kernel(base, planes) for base in (2, 3)}
    for where, rows in (("in cache", 256), ("from memory", 131072)):
        codes = rng.integers(0, 3, (256, K), np.uint8)
        q = rng.integers(-127, 128, (planes, K), np.int8)
        expected = codes.astype(np.int64) @ (q.astype(np.int64) * [[1], [256]][:planes]).sum(0)
        packed = {base: np.tile(_pack(codes, base), (rows // 256, 1, 1, 1)) for base in kernels}
        seconds: dict[int, list[float]] = {base: [] for base in kernels}
        out = np.zeros((rows // ROWS, ROWS), np.int32)
        for turn in range(rounds + 1):
            for base, multiply in kernels.items():
                began = time.perf_counter()
                multiply(isa, packed[base], q, out)
                if turn:
                    seconds[base].append(time.perf_counter() - began)
                elif not np.array_equal(out[: 256 // ROWS].ravel(), expected):
                    raise click.ClickException(f"the kernel of base {base} is wrong")
        rate = {base: rows * K / median(times) / 1e9 for base, times in seconds.items()}
        click.echo(f"{where}: {rate[2]:.1f} G weights/s at 2 bits, {rate[3]:.1f} in base 3")
        result[where] = {"two_bit": rate[2], "base3": rate[3], "base3_to_two_bit": rate[3] / rate[2]}
    click.echo(json.dumps(result))


if __name__ == "__main__":
    run_command(main, "scripts/bench/base3.py")
