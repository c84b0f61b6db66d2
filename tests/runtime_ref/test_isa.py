"""Instruction sets: each this CPU has gives the specification's bits; the others at least become the right instruction."""

import re

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from runtime_ref.kernels import isa
from runtime_ref.model import Model
from tests.runtime_ref.small import TOKENS, all_logits, reference_logits, sha, source
from tmexport.errors import UsageError


@pytest.mark.parametrize("name", isa.available())
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_every_set_of_this_cpu_equals_the_specification(name, profile, monkeypatch):
    monkeypatch.setenv("RUNTIME_REF_ISA", name)
    src = source()
    model = Model(src, profile, 1)
    assert isinstance(isa.select(), isa.SETS[name][0])
    assert sha(all_logits(model, TOKENS)) == sha(reference_logits(src, profile, TOKENS))


def test_a_set_this_cpu_lacks_or_nobody_knows_is_refused(monkeypatch):
    monkeypatch.setenv("RUNTIME_REF_ISA", "sse9")
    with pytest.raises(UsageError, match="sse9.*expected one of avx512vnni"):
        isa.select()
    missing = sorted(set(isa.SETS) - set(isa.available()))[0]
    monkeypatch.setenv("RUNTIME_REF_ISA", missing)
    with pytest.raises(UsageError, match=f"{missing}, which this CPU lacks"):
        isa.select()


def _assembly(name: str, triple: str, cpu: str, features: str) -> str:
    """A loop over 16 vectors of byte products and one pair product, compiled for another CPU."""
    primitives = isa.PRIMITIVES[isa.SETS[name][0]]
    vector = ir.VectorType(ir.IntType(32), primitives.lanes)
    module = ir.Module()
    kind = ir.FunctionType(vector, [vector, vector, vector])
    function = ir.Function(module, kind, "kernel")
    builder = ir.IRBuilder(function.append_basic_block())
    total, codes, q = function.args
    sums = primitives.bytes_dot(builder, ir.Constant(primitives.sums, None), codes, q)
    builder.ret(primitives.pairs_dot(builder, builder.add(total, primitives.bytes_total(builder, sums, 8)), codes, q))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
    return machine.emit_assembly(parsed)


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize(
    ("name", "triple", "cpu", "features", "wanted"),
    [
        ("avx512vnni", X86, "icelake-server", "", ["vpdpbusd.*zmm", "(vpdpwssd|vpmaddwd).*zmm"]),
        ("avxvnni", X86, "alderlake", "", ["vpdpbusd.*ymm", "(vpdpwssd|vpmaddwd).*ymm"]),
        ("avx2", X86, "haswell", "", ["vpmaddubsw.*ymm", "vpmaddwd.*ymm"]),
        ("neon_dotprod", ARM, "generic", "+dotprod", [r"sdot\tv", "smull"]),
        ("neon", ARM, "generic", "", ["smull", "addp"]),
        ("portable", X86, "x86-64", "", ["pmul"]),
    ],
)
def test_each_set_becomes_its_instructions(name, triple, cpu, features, wanted):
    assembly = _assembly(name, triple, cpu, features)
    for instruction in wanted:
        assert re.search(instruction, assembly)


def test_byte_sums_of_a_group_fit_16_bits():
    """What the AVX2 kernel relies on: 64 pairs of codes 0..2 and int8 values never leave int16."""
    assert np.iinfo(np.int16).max >= 64 * 2 * 2 * 127
    assert np.iinfo(np.int16).min <= 64 * 2 * 2 * -128
