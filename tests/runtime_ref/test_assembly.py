"""The hot loops, compiled by LLVM for cores that need not be here: the instructions that they are written for."""

import re
from collections import Counter

import pytest

from runtime_ref.kernels import isa
from runtime_ref.kernels.block_tiles import PairSums, block_sums, q4_tile, q8_tile
from runtime_ref.kernels.tiles import ternary_tile
from scripts.machines.tile_code import ARM, X86, hot_loop


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
        loop = hot_loop(intrinsic, name, "exact", 1, triple, core)
        assert any(re.search(wanted, line) for line in loop), loop
        assert not [line for line in loop if re.match("call|blr?\t", line)]


@pytest.mark.parametrize(
    ("name", "core", "products", "profile", "tokens", "most"),
    [
        ("neon_dotprod", "cortex-a76", ["sdot"], "fast", 1, 40),
        ("neon_dotprod", "cortex-a76", ["sdot"], "fast", 4, 98),
        ("neon_dotprod", "cortex-a76", ["sdot"], "exact", 1, 62),
        ("neon_dotprod", "cortex-a76", ["sdot"], "exact", 2, 98),
        ("neon", "cortex-a72", ["smlal", "smlal2"], "fast", 1, 71),
        ("neon", "cortex-a72", ["smlal", "smlal2"], "fast", 2, 110),
        ("neon", "cortex-a72", ["smlal", "smlal2"], "exact", 1, 111),
    ],
)
def test_arm_loops_hold_little_but_products(name, core, products, profile, tokens, most):
    """A step is 16 rows of 16 codes, 4 codes of 4 rows an sdot; 16 to 24 instructions unpack the codes. No accumulator is spilled."""
    loop = hot_loop(ternary_tile, name, profile, tokens, ARM, core)
    count = Counter(line.split()[0] for line in loop)
    planes = 2 if profile == "exact" else 1
    assert [count[product] for product in products] == [16 * tokens * planes] * len(products)
    assert not [line for line in loop if re.match("st[rpu]", line)]
    assert len(loop) <= 1.1 * most  # counted with LLVM 22; a tenth for another release's loop counter and addresses
