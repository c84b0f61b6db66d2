"""The triples of a PackedBase3 out of its bytes, as LLVM code."""

from __future__ import annotations

from llvmlite import ir

from runtime_ref.kernels.tiles import I8, I16, V

BYTES, WORDS = ir.VectorType(I8, 64), ir.VectorType(I16, 32)


def same(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def looked_up(b: ir.IRBuilder, table: V, index: V) -> V:
    """Bytes of a table of 64, by the low 6 bits of each byte of the index; what lies above them does not count."""
    return instruction(b, "avx512.permvar.qi.512", BYTES, table, index)


def instruction(b: ir.IRBuilder, name: str, result: ir.VectorType, *args: V) -> V:
    """An instruction of x86, by LLVM's name for it."""
    name = f"llvm.x86.{name}"
    kind = ir.FunctionType(result, [a.type for a in args])
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), args)


def indices(b: ir.IRBuilder, x: list[V]) -> list[V]:
    """The triples of two bytes, or of five, in the low 5 bits of vectors of bytes; above them is something else."""

    def down(value: V, bits: int) -> V:
        return b.bitcast(b.lshr(b.bitcast(value, WORDS), same(WORDS, bits)), BYTES)

    def chosen(mask: int, yes: V, no: V) -> V:
        return b.or_(b.and_(yes, same(BYTES, mask)), b.and_(no, same(BYTES, 255 - mask)))

    def pair(first: V, second: V) -> list[V]:
        return [first, second, chosen(7, down(first, 5), down(second, 2))]

    if len(x) == 2:
        return pair(*x)
    last = chosen(7, down(x[4], 5), chosen(8, down(x[1], 4), down(x[3], 3)))
    return [*pair(x[0], x[1]), *pair(x[2], x[3]), x[4], last]
