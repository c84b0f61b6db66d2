"""The hot loops, compiled by LLVM for cores that need not be here: the instructions that they are written for."""

import re
from collections import Counter

import llvmlite.binding as llvm
import pytest

from runtime_ref.kernels import isa
from runtime_ref.kernels.block_tiles import PairSums, block_sums, q4_tile, q8_tile
from runtime_ref.kernels.tiles import ternary_tile
from tests.runtime_ref.tile_code import kernel_ir, optimised

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"


def _innermost_loops(assembly):
    """The instructions of every loop that holds no other loop."""
    lines = [line.strip() for line in assembly.split("\n")]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    spans = []
    for end, line in enumerate(lines):
        target = re.match(r"(?:b\.\w+|[ct]bn?z|b|j\w+)\s.*?(\.LBB\w+)", line)
        if target and labels[target[1]] < end:
            spans.append((labels[target[1]], end))
    inner = [s for s in spans if not any(s != other and s[0] <= other[0] and other[1] <= s[1] for other in spans)]
    return [[line for line in lines[a : z + 1] if re.match("[a-z{]", line)] for a, z in inner]


def _hot_loop(intrinsic, name, profile, tokens, triple, core):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=core, opt=3)
    code, _ = kernel_ir(intrinsic, name, profile, tokens)
    (loop,) = _innermost_loops(machine.emit_assembly(optimised(code, machine)))
    return loop


@pytest.mark.parametrize(
    ("name", "triple", "core", "of_codes", "of_pairs"),
    [
        ("avx512vnni", X86, "icelake-server", "vpdpbusd.*zmm", "(vpdpwssd|vpmaddwd).*zmm"),
        ("avxvnni", X86, "alderlake", "vpdpbusd.*ymm", "(vpdpwssd|vpmaddwd).*ymm"),
        ("avx2", X86, "haswell", "vpmaddubsw.*ymm", "vpmaddwd.*ymm"),
        ("neon_dotprod", ARM, "cortex-a76", r"sdot\tv", "smlal2?\t.*4s"),
        ("neon", ARM, "cortex-a72", "smlal2?\t.*8h", "smlal2?\t.*4s"),
        ("portable", X86, "ivybridge", "pm(ul|add)", "pm(ul|add)"),
    ],
)
def test_each_set_becomes_its_instructions(name, triple, core, of_codes, of_pairs):
    """In the loop itself, with no call out of it."""
    of_q8 = of_pairs if block_sums(isa.SETS[name][0], 8) is PairSums else of_codes
    for intrinsic, wanted in ((ternary_tile, of_codes), (q8_tile, of_q8), (q4_tile, of_codes)):
        loop = _hot_loop(intrinsic, name, "exact", 1, triple, core)
        assert any(re.search(wanted, line) for line in loop), loop
        assert not [line for line in loop if re.match("call|blr?\t", line)]


@pytest.mark.parametrize(
    ("name", "core", "products", "profile", "tokens", "most"),
    [
        ("neon_dotprod", "cortex-a76", ["sdot"], "fast", 1, 52),
        ("neon_dotprod", "cortex-a76", ["sdot"], "fast", 4, 102),
        ("neon_dotprod", "cortex-a76", ["sdot"], "exact", 2, 102),
        ("neon", "cortex-a72", ["smlal", "smlal2"], "fast", 1, 75),
        ("neon", "cortex-a72", ["smlal", "smlal2"], "fast", 2, 114),
        ("neon", "cortex-a72", ["smlal", "smlal2"], "exact", 1, 115),
    ],
)
def test_arm_loops_hold_little_but_products(name, core, products, profile, tokens, most):
    """A step is 16 rows of 16 codes, 4 codes of 4 rows an sdot; 28 instructions unpack the codes. No accumulator is spilled."""
    loop = _hot_loop(ternary_tile, name, profile, tokens, ARM, core)
    count = Counter(line.split()[0] for line in loop)
    planes = 2 if profile == "exact" else 1
    assert [count[product] for product in products] == [16 * tokens * planes] * len(products)
    assert not [line for line in loop if re.match("st[rpu]", line)]
    assert len(loop) <= 1.1 * most  # counted with LLVM 22; a tenth for another release's loop counter and addresses
