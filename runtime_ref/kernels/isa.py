"""Instruction sets: the one place where kernels differ. Each is a Numba type, so that kernels are compiled for it.

A set says how many int32 lanes a vector has and how to take a dot product of bytes and of pairs of 16-bit integers.
RUNTIME_REF_ISA names one of SETS; empty or unset picks the best the CPU has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

from runtime_ref.kernels.vector import splatted
from tmexport.errors import UsageError

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
B = ir.IRBuilder
V = ir.Value


class Avx512Vnni(NamedTuple):
    lanes: int


class AvxVnni(NamedTuple):
    lanes: int


class Avx2(NamedTuple):
    lanes: int


class NeonDotprod(NamedTuple):
    lanes: int


class Neon(NamedTuple):
    lanes: int


class Portable(NamedTuple):
    lanes: int


@dataclass(frozen=True)
class Primitives:
    """How one instruction set takes dot products.

    lanes: int32 lanes of a vector. sums: type of the accumulator of byte products. in_flight: tokens times activation
    planes that a tile kernel keeps in registers. bytes_dot(b, sums, codes, q): sums += 4 products of a lane, codes in
    0..2 and q int8. bytes_total(b, sums, shift): the int32 totals << shift. pairs_dot(b, total, a, c): total += 2
    products of the int16 halves of a lane.
    """

    lanes: int
    sums: ir.VectorType
    in_flight: int
    bytes_dot: Callable[[B, V, V, V], V]
    bytes_total: Callable[[B, V, int], V]
    pairs_dot: Callable[[B, V, V, V], V]


def _vector(element: ir.Type, lanes: int) -> ir.VectorType:
    return ir.VectorType(element, lanes)


def _call(b: B, name: str, result: ir.Type, *args: V) -> V:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def constant(element: ir.Type, lanes: int, value: int) -> ir.Constant:
    """A vector constant with one value in all lanes."""
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _shifted(b: B, total: V, shift: int) -> V:
    return b.shl(total, constant(I32, total.type.count, shift)) if shift else total


def _generic_bytes(b: B, total: V, codes: V, q: V) -> V:
    """Byte by byte in 32-bit lanes: no instruction beyond shifts and multiplications."""
    lanes = total.type.count
    for byte in range(4):
        code = b.and_(b.lshr(codes, constant(I32, lanes, 8 * byte)), constant(I32, lanes, 0xFF))
        value = b.ashr(b.shl(q, constant(I32, lanes, 24 - 8 * byte)), constant(I32, lanes, 24))
        total = b.add(total, b.mul(code, value))
    return total


def _generic_pairs(b: B, total: V, a: V, c: V) -> V:
    sixteen = constant(I32, total.type.count, 16)
    low = b.mul(b.ashr(b.shl(a, sixteen), sixteen), b.ashr(b.shl(c, sixteen), sixteen))
    return b.add(total, b.add(low, b.mul(b.ashr(a, sixteen), b.ashr(c, sixteen))))


def _vnni(lanes: int, width: int, in_flight: int) -> Primitives:
    vector = _vector(I32, lanes)

    def bytes_dot(b: B, total: V, codes: V, q: V) -> V:
        wide = _vector(I8, 4 * lanes)
        return _call(b, f"llvm.x86.avx512.vpdpbusd.{width}", vector, total, b.bitcast(codes, wide), b.bitcast(q, wide))

    def pairs_dot(b: B, total: V, a: V, c: V) -> V:
        wide = _vector(I16, 2 * lanes)
        return _call(b, f"llvm.x86.avx512.vpdpwssd.{width}", vector, total, b.bitcast(a, wide), b.bitcast(c, wide))

    return Primitives(lanes, vector, in_flight, bytes_dot, _shifted, pairs_dot)


def _pinned(b: B, value: V) -> V:
    """The value, in a register: keeps LLVM from regrouping a long chain of sums, which spills accumulators."""
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=x,0", [value], side_effect=False)


def _avx2() -> Primitives:
    """Sums of byte products stay in int16: a code is at most 2, so 64 pairs of 256 weights reach 32512 and -32768."""
    words, ints = _vector(I16, 16), _vector(I32, 8)

    def bytes_dot(b: B, sums: V, codes: V, q: V) -> V:
        wide = _vector(I8, 32)
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", words, b.bitcast(codes, wide), b.bitcast(q, wide))
        return _pinned(b, b.add(sums, pairs))

    def bytes_total(b: B, sums: V, shift: int) -> V:
        return _call(b, "llvm.x86.avx2.pmadd.wd", ints, sums, constant(I16, 16, 1 << shift))

    def pairs_dot(b: B, total: V, a: V, c: V) -> V:
        return b.add(total, _call(b, "llvm.x86.avx2.pmadd.wd", ints, b.bitcast(a, words), b.bitcast(c, words)))

    return Primitives(8, words, 4, bytes_dot, bytes_total, pairs_dot)


def _neon(dotprod: bool) -> Primitives:
    ints, words, quads = _vector(I32, 4), _vector(I16, 8), _vector(I8, 16)

    def half(b: B, vector: V, which: int) -> V:
        count = vector.type.count // 2
        mask = ir.Constant(_vector(I32, count), list(range(which * count, (which + 1) * count)))
        return b.shuffle_vector(vector, vector, mask)

    def widening_product(b: B, a: V, c: V) -> V:
        element = I16 if a.type.element == I8 else I32
        wide = _vector(element, a.type.count)
        return b.mul(b.sext(a, wide), b.sext(c, wide))  # selected as smull

    def pairwise(b: B, name: str, result: ir.VectorType, *args: V) -> V:
        return _call(b, f"llvm.aarch64.neon.{name}", result, *args)

    def bytes_dot(b: B, total: V, codes: V, q: V) -> V:
        codes, q = b.bitcast(codes, quads), b.bitcast(q, quads)
        if dotprod:
            return pairwise(b, "sdot.v4i32.v16i8", ints, total, codes, q)
        halves = [widening_product(b, half(b, codes, h), half(b, q, h)) for h in (0, 1)]
        # addp: pairs within each half; the four products of a lane are then two neighbouring int16
        return b.add(total, pairwise(b, "saddlp.v4i32.v8i16", ints, pairwise(b, "addp.v8i16", words, *halves)))

    def pairs_dot(b: B, total: V, a: V, c: V) -> V:
        a, c = b.bitcast(a, words), b.bitcast(c, words)
        halves = [widening_product(b, half(b, a, h), half(b, c, h)) for h in (0, 1)]
        return b.add(total, pairwise(b, "addp.v4i32", ints, *halves))

    return Primitives(4, ints, 4, bytes_dot, _shifted, pairs_dot)


PRIMITIVES: dict[type, Primitives] = {
    Avx512Vnni: _vnni(16, 512, 8),
    AvxVnni: _vnni(8, 256, 4),
    Avx2: _avx2(),
    NeonDotprod: _neon(True),
    Neon: _neon(False),
    Portable: Primitives(16, _vector(I32, 16), 2, _generic_bytes, _shifted, _generic_pairs),
}

Isa = Avx512Vnni | AvxVnni | Avx2 | NeonDotprod | Neon | Portable

# best first, with the CPU features each needs (LLVM's names); f16c converts the scales
SETS: dict[str, tuple[type, tuple[str, ...]]] = {
    "avx512vnni": (Avx512Vnni, ("avx512f", "avx512bw", "avx512vl", "avx512vnni")),
    "avxvnni": (AvxVnni, ("avxvnni",)),
    "avx2": (Avx2, ("avx2", "f16c")),
    "neon_dotprod": (NeonDotprod, ("neon", "dotprod")),
    "neon": (Neon, ("neon",)),
    "portable": (Portable, ()),
}


def available() -> list[str]:
    """Names of the instruction sets this CPU has, best first."""
    features = llvm.get_host_cpu_features()
    return [name for name, (_, needs) in SETS.items() if all(features.get(need, False) for need in needs)]


def select() -> Isa:
    """The instruction set to use: the one RUNTIME_REF_ISA names, else the best.

    Raises:
        UsageError: RUNTIME_REF_ISA names an unknown set, or one this CPU lacks.
    """
    wanted = os.environ.get("RUNTIME_REF_ISA", "").strip().lower()
    usable = available()
    if wanted and wanted not in SETS:
        raise UsageError(f"RUNTIME_REF_ISA is {wanted!r}; expected one of {', '.join(SETS)}, or nothing for the best")
    if wanted and wanted not in usable:
        raise UsageError(f"RUNTIME_REF_ISA is {wanted}, which this CPU lacks; it has {', '.join(usable)}")
    kind = SETS[wanted or usable[0]][0]
    return kind(PRIMITIVES[kind].lanes)


def broadcast(b: B, pointer: V, lanes: int) -> V:
    """The 32-bit word at `pointer` in all lanes."""
    return splatted(b, b.load(b.bitcast(pointer, I32.as_pointer()), align=1), lanes)
