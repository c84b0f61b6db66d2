"""Large ternary matrices in base 3: the layout by its definition, the rule, and products against integer sums in numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels import isa
from runtime_ref.kernels.kinds import pack
from runtime_ref.kernels.packed import base3, expect
from runtime_ref.model import Model
from runtime_ref.reference.blocks import BlockMatrix
from runtime_ref.reference.ternary import TernaryMatrix
from scripts.bench.base3 import measure
from tests.runtime_ref.integer_sums import specified
from tests.runtime_ref.small import TOKENS, all_logits, reference_logits, sha, source
from tests.runtime_ref.test_tables import chosen, product, quantised
from tmexport.errors import UsageError

FAST = PRESETS["fast"].activations
BYTES = {32: 7, 64: 14, 128: 27, 256: 54}
# The sets that keep large matrices so on this CPU
SETS = [
    name
    for name in isa.available()
    if isa.PRIMITIVES[isa.SETS[name][0]].base3 and base3.features().issuperset(base3.NEEDS)
]


def random_matrix(rng, n, k, group):
    codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
    return TernaryMatrix(codes, rng.uniform(0.01, 0.1, (n, k // group)).astype(np.float16))


def columns_of(block):
    """Of each triple the columns of its three digits, None where there is none: the layout's definition, a twelve at a time."""
    found = []
    for c in range(0, block, 12):
        twelve = [(c, c + 1, c + 2), (c + 3, c + 7, c + 11), (c + 4, c + 5, c + 6), (c + 8, c + 9, c + 10)]
        found += [[column if column < block else None for column in triple] for triple in twelve]
    return [triple for triple in found if triple[0] is not None]


def triples_of(row):
    """The numbers below 27 in the bytes of one row of a block."""
    found, left = [], [int(byte) for byte in row]
    while len(left) >= 5:
        b, left = left[:5], left[5:]
        found += [b[0] & 31, b[1] & 31, b[0] >> 5 | (b[1] >> 5 & 3) << 3]
        found += [b[2] & 31, b[3] & 31, b[2] >> 5 | (b[3] >> 5 & 3) << 3]
        found += [b[4] & 31, b[4] >> 5 | b[1] >> 7 << 3 | b[3] >> 7 << 4]
    for first, second in zip(left[::2], left[1::2], strict=True):
        found += [first & 31, second & 31, first >> 5 | (second >> 5 & 3) << 3]
    return found


@given(st.sampled_from(base3.BLOCKS), st.integers(1, 150), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_codes_and_scales_come_back_by_the_definition(block, n, blocks, seed):
    rng, k = np.random.default_rng(seed), 256 * blocks
    group = int(rng.choice([g for g in (32, 64, 128, 256) if g >= block]))
    matrix = random_matrix(rng, n, k, group)
    packed = base3.pack(pack(matrix), block)
    expect(packed, n, k, block, "the matrix")
    assert packed.codes.shape == (k // block, -(-n // 64), BYTES[block], 64)
    columns, row = columns_of(block), int(rng.integers(n))
    tile, lane = row // 64, 4 * (row % 16) + row % 64 // 16
    for i in range(k // block):
        triples = triples_of(packed.codes[i, tile, :, lane])
        assert len(triples) == len(columns) == base3.n_triples(block)
        for number, wanted in zip(triples, columns, strict=True):
            digits = [number % 3, number // 3 % 3, number // 9]
            for digit, column in zip(digits, wanted, strict=True):
                assert digit == (1 if column is None else matrix.codes[row, i * block + column] + 1)
        scale = packed.scales[i * block // group, tile, row % 64 : row % 64 + 1].view(np.float16)
        assert scale == matrix.scales[row, i * block // group]


def test_rows_beyond_the_last_hold_nothing():
    packed = base3.pack(pack(random_matrix(np.random.default_rng(0), 65, 256, 256)), 256)
    assert not packed.scales[:, 1, 1:].any()
    assert set(triples_of(packed.codes[0, 1, :, 4])) == {13}  # row 65: codes 0


def test_other_shapes_than_the_kernels_read_are_refused():
    packed = base3.pack(pack(random_matrix(np.random.default_rng(0), 64, 512, 256)), 256)
    for wrong in ((130, 512, 256), (64, 768, 256), (64, 512, 128), (64, 512, 512)):
        with pytest.raises(ValueError, match="the matrix"):
            expect(packed, *wrong, "the matrix")


def test_the_rule(monkeypatch):
    """AMX, which takes prompts out of it, and bytes that are permuted; 2**23 weights at least; ternary codes only."""
    monkeypatch.setattr(base3, "features", lambda: {"avx512vbmi", "gfni"})
    large = pack(random_matrix(np.random.default_rng(0), 8192, 1024, 256))
    small = pack(random_matrix(np.random.default_rng(0), 8176, 1024, 256))
    for name, (kind, _) in isa.SETS.items():
        assert base3.suits(chosen(name), FAST, large, 256) == (kind is isa.Amx)
    amx = chosen("amx")
    assert not base3.suits(amx, FAST, small, 256)
    assert not base3.suits(amx, FAST, large, 512)
    assert not base3.suits(
        amx, FAST, pack(BlockMatrix(np.ones((8192, 1024), np.int8), np.ones((8192, 32), np.float16), 8)), 32
    )
    assert not base3.suits(amx, PRESETS["exact"].activations, large, 256)
    monkeypatch.setattr(base3, "features", lambda: {"avx512vbmi"})
    assert not base3.suits(amx, FAST, large, 256)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize(
    ("n", "k", "group", "block"), [(200, 1024, 256, 256), (130, 256, 64, 64), (64, 512, 128, 128), (17, 128, 64, 32)]
)
def test_products_equal_integer_sums(name, profile, n, k, group, block):
    """One token, a few, and enough for AMX, also where not all of 16 are there; at the ends of what activations are."""
    rng, most = np.random.default_rng(n), {"exact": 32512, "fast": 127}[profile]
    matrix = random_matrix(rng, n, k, group)
    matrix.codes[0], matrix.codes[-1] = 1, -1
    packed = base3.pack(pack(matrix), block)
    activations = PRESETS[profile].activations
    for tokens in (1, 3, 21):
        q = rng.integers(-most, most + 1, (tokens, k))
        q[0] = most
        q[-1] = -most if tokens > 1 else most
        q_scale = rng.uniform(0.001, 0.01, (tokens, k // block)).astype(np.float32)
        want = specified(matrix.codes, matrix.scales, q, q_scale)
        for add in (False, True):
            before = rng.standard_normal((tokens, -(-n // 16) * 16)).astype(np.float32)
            out = before.copy()
            for tid in range(2):
                product(
                    chosen(name), activations, packed, quantised(q, q_scale, block), tokens, k, block, out, add, tid, 2
                )
            expected = before[:, :n] + want if add else want
            assert out[:, :n].tobytes() == expected.tobytes(), (tokens, add)


@pytest.mark.parametrize("profile", ["exact", "fast", "compact"])
def test_a_model_kept_so_gives_the_specifications_bits(profile, monkeypatch):
    """With every ternary matrix in base 3 where the CPU can: token by token, as a prompt, and on two threads; and it is smaller."""
    src = source("ternary64")
    plain = Model(src, profile, 1).weight_bytes
    monkeypatch.setattr(base3, "FEWEST", 1)
    model, want = Model(src, profile, 2), reference_logits(src, profile, TOKENS)
    state = model.new_state()
    assert sha(np.stack([model.decode(state, token) for token in TOKENS])) == sha(want)
    assert sha(all_logits(model, TOKENS)) == sha(want)
    used = profile != "exact" and any(type(isa.select()) is isa.SETS[name][0] for name in SETS)
    assert (model.weight_bytes < plain) == used


@pytest.mark.parametrize("name", SETS or [None])
def test_the_comparison_of_layouts_runs_or_says_why_not(name, monkeypatch):
    """Large enough for the rule: 2**23 weights."""
    monkeypatch.setenv("RUNTIME_REF_ISA", name or "")
    if name is None:
        with pytest.raises(UsageError, match="keeps no matrix of 4096 x 2048 in base 3"):
            measure("fast", 4096, 1, 1, 1)
    else:
        assert measure("fast", 4096, 1, 1, 1)["ratio"] > 0
