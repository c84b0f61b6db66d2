"""Products of many tokens, by tables of sums and by AMX, against integer sums in numpy: limits, remainders, scales, shares of threads."""

import numpy as np
import pytest
from numba import njit

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels import isa, tables
from runtime_ref.kernels.kinds import pack
from runtime_ref.kernels.matmul import multiply
from runtime_ref.kernels.scratch import Room, allocate
from runtime_ref.reference.blocks import BlockMatrix
from runtime_ref.reference.ternary import TernaryMatrix
from tests.runtime_ref.integer_sums import specified

LARGEST = {"exact": 32512, "fast": 127}  # activations as the quantiser makes them


@njit
def product(kind, profile, packed, s, rows, k, block, out, add, tid, threads):
    multiply(kind, profile, packed, s, rows, k, block, out, add, tid, threads)


@njit
def done_by_tables(kind, profile, packed, s, rows, k, block, out, first, end):
    return tables.by_tables(kind, profile, packed.codes, packed.scales, s, rows, k, block, out, False, first, end)


def packed_of(codes, scales):
    """A packed matrix."""
    return pack(TernaryMatrix(codes, scales))


def quantised(q, q_scale, block):
    """A Scratch's rows that hold these activations."""
    tokens, k = q.shape
    s = allocate(tokens, Room(wide=k))
    upper = (q + 128) >> 8
    s.q[:, :k], s.high[:tokens, :k], s.low[:tokens, :k] = q, upper, q - 256 * upper
    s.q_scale[:tokens, : k // block] = q_scale
    s.q_sum[:, : k // block] = q.reshape(tokens, -1, block).sum(2)
    return s


SETS = [name for name in isa.available() if isa.PRIMITIVES[isa.SETS[name][0]].tables]
UNITS = [name for name in isa.available() if isa.PRIMITIVES[isa.SETS[name][0]].matrices]


def chosen(name):
    kind = isa.SETS[name][0]
    return kind(isa.PRIMITIVES[kind].lanes)


@pytest.mark.parametrize("name", SETS + UNITS)
@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize(
    ("n", "k", "group", "block"),
    [(520, 512, 256, 256), (1050, 256, 256, 64), (2203, 512, 64, 64), (40, 128, 128, 128), (40, 128, 64, 32)],
)
def test_products_of_many_tokens(name, profile, n, k, group, block):
    rng = np.random.default_rng(n)
    codes = rng.integers(-1, 2, (n, k)).astype(np.int8)
    codes[1], codes[2] = 1, -1
    scales = rng.uniform(0.01, 0.1, (n, k // group)).astype(np.float16)
    same_bits(name, profile, packed_of(codes, scales), codes, scales, block)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "k"), [(40, 96), (576, 576)])
def test_blocks_times_many_tokens(name, profile, bits, n, k):
    rng = np.random.default_rng(k)
    least = -(2 ** (bits - 1))
    codes = rng.integers(least, -least, (n, k)).astype(np.int8)
    codes[1], codes[2] = least, -least - 1
    scales = rng.uniform(-0.1, 0.1, (n, k // 32)).astype(np.float16)
    same_bits(name, profile, pack(BlockMatrix(codes, scales, bits)), codes, scales, 32)


def same_bits(name, profile, packed, codes, scales, block):
    """Asserts that products of several numbers of tokens, by two threads, are the specified bits."""
    (n, k), rng = codes.shape, np.random.default_rng(len(codes))
    top, how = LARGEST[profile], PRESETS[profile].activations
    for tokens in (8, 16, 23, 41, 64, 70):
        q = rng.integers(-top, top + 1, (tokens, k)).astype(np.int32)
        q[0], q[3], q[5] = top, -top, 0
        q_scale = rng.uniform(0.001, 0.01, (tokens, k // block)).astype(np.float32)
        q_scale[7] = 0.0
        s, wanted = quantised(q, q_scale, block), specified(codes, scales, q, q_scale)
        for add in (False, True):
            out = np.full((tokens, n), 0.5, np.float32)
            for tid in range(2):
                product(chosen(name), how, packed, s, tokens, k, block, out, add, tid, 2)
            assert out.tobytes() == (np.float32(0.5) + wanted if add else wanted).tobytes(), (tokens, add)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("profile", "size"), [("exact", 4), ("fast", 2)])
def test_whole_vectors_of_tokens_only_and_never_too_few(name, profile, size):
    lanes = isa.PRIMITIVES[isa.SETS[name][0]].tables // size
    packed = packed_of(np.ones((512, 64), np.int8), np.ones((512, 1), np.float16))

    def done(tokens, end=32, block=64):
        q = np.ones((tokens, 64), np.int32)
        s = quantised(q, np.ones((tokens, 64 // block), np.float32), block)
        return done_by_tables(
            chosen(name),
            PRESETS[profile].activations,
            packed,
            s,
            tokens,
            64,
            block,
            np.zeros((tokens, 512), np.float32),
            0,
            end,
        )

    assert [done(tokens) for tokens in (15, 16, 31, 33)] == [0, *(n // lanes * lanes for n in (16, 31, 33))]
    assert done(16, end=31) == done(16, block=16) == 0
