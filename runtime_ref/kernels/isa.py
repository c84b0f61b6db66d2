"""Instruction sets: the one place where kernels differ. Each is a Numba type, so that kernels are compiled for it.

A set says how many int32 lanes a vector has and how to take a dot product of bytes and of pairs of 16-bit integers.
RUNTIME_REF_ISA names one of SETS; empty or unset picks the best the CPU has.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

from llvmlite import ir

from runtime_ref.kernels.cpu import core, features, is_x86
from runtime_ref.kernels.vector import splatted
from tmexport.errors import UsageError

I8, I16, I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
B: TypeAlias = ir.IRBuilder
V: TypeAlias = ir.Value


class Amx(NamedTuple):
    lanes: int


class Avx512Vnni(NamedTuple):
    lanes: int


class Avx512Tables(NamedTuple):
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


Places: TypeAlias = tuple[int, int, int, int]
ALIGNED: Places = (0, 0, 0, 0)
AS_STORED: Places = (0, 2, 4, 6)


@dataclass(frozen=True)
class Products:
    """Sums of products in the int32 lanes of vectors: of 4 bytes a lane, codes in 0..15 and q int8, or of 2 int16.

    sums: the accumulator's type. in_flight: for how many tokens times activation planes a tile kernel keeps accumulators
    in registers. words(b, pointer, word): the word-th (literal, 0..3) 32-bit word of activations, as `dot` wants it.
    dot(b, sums, a, q, word): sums += the products of each lane of a and that word. total(b, sums, shift): the int32
    totals << shift; of bytes, there may have been 64 words with codes up to 2, or 8 with codes up to 15. in_place: whether
    codes may stay where they are in their byte, up to 15 << 4. places: to which bit a single token's four ternary codes of a
    byte are brought, with one activation plane and with two; each place has sums of its own: a code that stays needs no shift,
    and the first waits for fewer products. whole: what is added to a code of -128..127 before `dot` takes it as a byte;
    None: the sums are too narrow for such codes.
    """

    sums: ir.VectorType
    in_flight: int
    words: Callable[[B, V, int], V]
    dot: Callable[[B, V, V, V, int], V]
    total: Callable[[B, V, int], V]
    in_place: bool = False
    places: tuple[Places, Places] = (ALIGNED, ALIGNED)
    whole: int | None = None


@dataclass(frozen=True)
class Primitives:
    """How one instruction set, with vectors of `lanes` int32 lanes, takes dot products of bytes and of pairs of int16.

    tables: bytes of a vector where many tokens are multiplied by tables of sums (tables.py), else 0. matrices: whether they
    are multiplied by AMX (amx.py). scan: how many vectors of 16 of two channels' state the registers hold beside
    what a token brings; the first that fits is used.
    """

    lanes: int
    bytes: Products
    pairs: Products
    tables: int = 0
    matrices: bool = False
    scan: tuple[int, ...] = (2, 1)


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


def broadcast(b: B, pointer: V, lanes: int) -> V:
    """The 32-bit word at `pointer` in all lanes."""
    return splatted(b, b.load(b.bitcast(pointer, I32.as_pointer()), align=1), lanes)


def _broadcast_words(lanes: int) -> Callable[[B, V, int], V]:
    return lambda b, pointer, word: broadcast(b, b.gep(pointer, [ir.Constant(I32, 4 * word)]), lanes)


def _shifted(b: B, total: V, shift: int) -> V:
    return b.shl(total, constant(I32, total.type.count, shift)) if shift else total


def _pinned(b: B, value: V, register: str) -> V:
    """The value, in a register: keeps LLVM from regrouping a long chain of sums, which spills accumulators.

    register: the letter of vector registers in LLVM's inline assembly, x for x86 and w for Arm.
    """
    return b.asm(ir.FunctionType(value.type, [value.type]), "", f"={register},0", [value], side_effect=False)


def _portable(lanes: int) -> Primitives:
    """No instruction beyond shifts and multiplications of 32-bit lanes."""
    ints, words = _vector(I32, lanes), _broadcast_words(lanes)

    def bytes_dot(b: B, total: V, codes: V, q: V, word: int) -> V:
        for byte in range(4):
            code = b.and_(b.lshr(codes, constant(I32, lanes, 8 * byte)), constant(I32, lanes, 0xFF))
            value = b.ashr(b.shl(q, constant(I32, lanes, 24 - 8 * byte)), constant(I32, lanes, 24))
            total = b.add(total, b.mul(code, value))
        return total

    def pairs_dot(b: B, total: V, a: V, q: V, word: int) -> V:
        sixteen = constant(I32, lanes, 16)
        low = b.mul(b.ashr(b.shl(a, sixteen), sixteen), b.ashr(b.shl(q, sixteen), sixteen))
        return b.add(total, b.add(low, b.mul(b.ashr(a, sixteen), b.ashr(q, sixteen))))

    return Primitives(
        lanes, Products(ints, 2, words, bytes_dot, _shifted, whole=128), Products(ints, 2, words, pairs_dot, _shifted)
    )


def _vnni(lanes: int, width: int, in_flight: int) -> Primitives:
    ints, words = _vector(I32, lanes), _broadcast_words(lanes)

    def product(name: str, element: ir.Type, count: int) -> Products:
        wide = _vector(element, count)

        def dot(b: B, total: V, a: V, q: V, word: int) -> V:
            return _call(b, f"llvm.x86.avx512.{name}.{width}", ints, total, b.bitcast(a, wide), b.bitcast(q, wide))

        places = (AS_STORED, AS_STORED) if element is I8 else (ALIGNED, ALIGNED)
        return Products(ints, in_flight, words, dot, _shifted, element is I8, places, whole=128)

    scan = (8, 4, 1) if lanes == 16 else (2, 1)
    return Primitives(lanes, product("vpdpbusd", I8, 4 * lanes), product("vpdpwssd", I16, 2 * lanes), scan=scan)


def _avx2() -> Primitives:
    """Sums of byte products stay in int16: a code is at most 2, so 64 pairs of 256 weights reach 32512 and -32768."""
    halves, ints, words = _vector(I16, 16), _vector(I32, 8), _broadcast_words(8)

    def bytes_dot(b: B, sums: V, codes: V, q: V, word: int) -> V:
        wide = _vector(I8, 32)
        pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", halves, b.bitcast(codes, wide), b.bitcast(q, wide))
        return _pinned(b, b.add(sums, pairs), "x")

    def bytes_total(b: B, sums: V, shift: int) -> V:
        return _call(b, "llvm.x86.avx2.pmadd.wd", ints, sums, constant(I16, 16, 1 << shift))

    def pairs_dot(b: B, total: V, a: V, q: V, word: int) -> V:
        return b.add(total, _call(b, "llvm.x86.avx2.pmadd.wd", ints, b.bitcast(a, halves), b.bitcast(q, halves)))

    return Primitives(
        8,
        Products(halves, 4, words, bytes_dot, bytes_total),
        Products(ints, 4, words, pairs_dot, _shifted),
        tables=32,
    )


def _neon(dotprod: bool) -> Primitives:
    """Without sdot: the products of a vector's low half and of its high half (smlal, smlal2) go to two accumulators,
    which meet in `total`. Sums of byte products stay in int16, as for AVX2: 64 products reach 16256 and -16384.
    """
    ints, halves, quads = _vector(I32, 4), _vector(I16, 8), _vector(I8, 16)

    def half(b: B, vector: V, which: int) -> V:
        count = vector.type.count // 2
        mask = ir.Constant(_vector(I32, count), list(range(which * count, (which + 1) * count)))
        return b.shuffle_vector(vector, vector, mask)

    def words(b: B, pointer: V, word: int) -> V:
        """Pinned: LLVM would see that both halves are equal, and move the codes' high half down for want of q's."""
        return _pinned(b, _broadcast_words(4)(b, pointer, word), "w")

    def halves_dot(kind: ir.VectorType, product: ir.VectorType, in_flight: int, total: Callable[..., V]) -> Products:
        name = f"llvm.aarch64.neon.smull.v{product.count}i{product.element.width}"
        whole = ir.Constant(_vector(I32, 2 * product.count), list(range(2 * product.count)))

        def dot(b: B, sums: V, a: V, q: V, word: int) -> V:
            a, q = b.bitcast(a, kind), b.bitcast(q, kind)
            products = [_call(b, name, product, half(b, a, h), half(b, q, h)) for h in (0, 1)]
            added = [_pinned(b, b.add(half(b, sums, h), p), "w") for h, p in enumerate(products)]
            return b.shuffle_vector(*added, whole)

        return Products(_vector(product.element, 2 * product.count), in_flight, words, dot, total)

    def bytes_total(b: B, sums: V, shift: int) -> V:
        added = _call(b, "llvm.aarch64.neon.addp.v8i16", halves, half(b, sums, 0), half(b, sums, 1))
        return _shifted(b, _call(b, "llvm.aarch64.neon.saddlp.v4i32.v8i16", ints, added), shift)

    def pairs_total(b: B, sums: V, shift: int) -> V:
        return _shifted(b, _call(b, "llvm.aarch64.neon.addp.v4i32", ints, half(b, sums, 0), half(b, sums, 1)), shift)

    def four_words(b: B, pointer: V, word: int) -> V:
        return b.load(b.bitcast(pointer, ints.as_pointer()), align=1)

    def sdot(b: B, sums: V, codes: V, q: V, word: int) -> V:
        chosen = b.shuffle_vector(q, q, constant(I32, 4, word))  # not an instruction: sdot names a word of a register
        return _call(
            b, "llvm.aarch64.neon.sdot.v4i32.v16i8", ints, sums, b.bitcast(codes, quads), b.bitcast(chosen, quads)
        )

    # sdot's codes have a sign, so none stays in the highest place; two planes leave registers for two kinds of sums
    places = ((0, 2, 4, 0), (0, 2, 2, 0))
    by_sdot, by_smlal = (
        Products(ints, 4, four_words, sdot, _shifted, places=places, whole=0),
        halves_dot(quads, halves, 2, bytes_total),
    )
    return Primitives(4, by_sdot if dotprod else by_smlal, halves_dot(halves, ints, 2, pairs_total))


_VNNI_512 = _vnni(16, 512, 8)

PRIMITIVES: dict[type, Primitives] = {
    Amx: replace(_VNNI_512, bytes=replace(_VNNI_512.bytes, in_flight=4), matrices=True),  # it takes 8 tokens or more
    Avx512Vnni: _VNNI_512,
    Avx512Tables: replace(_VNNI_512, tables=64),
    AvxVnni: _vnni(8, 256, 4),
    Avx2: _avx2(),
    NeonDotprod: _neon(True),
    Neon: _neon(False),
    Portable: _portable(16),
}

Isa = Amx | Avx512Vnni | Avx512Tables | AvxVnni | Avx2 | NeonDotprod | Neon | Portable

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")

# best first, with the CPU features each needs (LLVM's names); f16c converts the scales
SETS: dict[str, tuple[type, tuple[str, ...]]] = {
    "amx": (Amx, (*_AVX512, "amx-tile", "amx-int8")),
    "avx512vnni": (Avx512Vnni, _AVX512),
    "avx512tables": (Avx512Tables, _AVX512),
    "avxvnni": (AvxVnni, ("avxvnni",)),
    "avx2": (Avx2, ("avx2", "f16c")),
    "neon_dotprod": (NeonDotprod, ("neon", "dotprod")),
    "neon": (Neon, ("neon",)),
    "portable": (Portable, ()),
}

# By core (LLVM's name), measured: products of 64 tokens in cache, GMAC/s of one thread, fast and exact (`bench.rates.ternary_rate`).
MEASURED: dict[str, dict[str, tuple[int, int]]] = {
    "znver4": {"avx512vnni": (202, 105), "avx512tables": (250, 138), "avx2": (219, 121)},
    "emeraldrapids": {
        "amx": (563, 388),
        "avx512vnni": (205, 112),
        "avx512tables": (210, 125),
        "avxvnni": (130, 65),
        "avx2": (131, 81),
    },
}


def available() -> list[str]:
    """Names of the instruction sets this CPU has, best first; none on x86 without F16C."""
    has = features()
    if is_x86() and "f16c" not in has:  # LLVM would call functions that convert fp16, which are not there: a crash
        return []
    return [name for name, (_, needs) in SETS.items() if has.issuperset(needs)]


def select() -> Isa:
    """The instruction set to use: the one RUNTIME_REF_ISA names, else the one measured fastest on this core, else the first.

    The fastest has the largest product of its two rates in MEASURED.

    Raises:
        UsageError: RUNTIME_REF_ISA names an unknown set, or one this CPU lacks; or it cannot convert fp16.
    """
    wanted = os.environ.get("RUNTIME_REF_ISA", "").strip().lower()
    usable = available()
    if wanted and wanted not in SETS:
        raise UsageError(f"RUNTIME_REF_ISA is {wanted!r}; expected one of {', '.join(SETS)}, or nothing for the best")
    if not usable:
        raise UsageError(
            "no F16C, which converts fp16; on x86 expected it in the CPU (since 2012) and in NUMBA_CPU_FEATURES"
        )
    if wanted and wanted not in usable:
        raise UsageError(f"RUNTIME_REF_ISA is {wanted}, which this CPU lacks; it has {', '.join(usable)}")
    rates = {name: fast * exact for name, (fast, exact) in MEASURED.get(core(), {}).items() if name in usable}
    kind = SETS[wanted or max(rates, key=rates.__getitem__, default=usable[0])][0]
    return kind(PRIMITIVES[kind].lanes)
