"""The tile kernels alone, compiled by LLVM without Numba, against integer sums in numpy: limits and layouts of every set."""

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest

from runtime_ref.arithmetic import PRESETS
from runtime_ref.kernels import isa
from runtime_ref.kernels.block_tiles import q4_tile, q8_tile, together
from runtime_ref.kernels.kinds import pack
from runtime_ref.kernels.tiles import ternary_tile
from runtime_ref.reference.blocks import BlockMatrix
from runtime_ref.reference.ternary import TernaryMatrix
from scripts.machines.tile_code import kernel_ir, optimised
from tests.runtime_ref.integer_sums import specified

K = 512
# As many as the instruction set with the most accumulators takes at a time, whatever this CPU has.
TOKENS = max(of.in_flight for p in isa.PRIMITIVES.values() for of in (p.bytes, p.pairs))
LARGEST = {
    "exact": 32639,
    "fast": 127,
}  # both planes of 256 * high + low at their ends: more than activations ever reach
SMALLEST = {"exact": -32640, "fast": -128}


def native(intrinsic, name, profile, tokens):
    """The kernel as a C function, and the engine that owns it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target, features = llvm.Target.from_default_triple(), llvm.get_host_cpu_features().flatten()
    options = {"cpu": llvm.get_host_cpu_name(), "features": features, "opt": 3}
    code, numbers = kernel_ir(intrinsic, name, profile, tokens)
    engine = llvm.create_mcjit_compiler(
        optimised(code, target.create_target_machine(**options)), target.create_target_machine(**options, jit=True)
    )
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * numbers)
    return kind(engine.get_function_address("kernel")), engine


def activations(rng, block, low, high):
    q = rng.integers(low, high + 1, (TOKENS, K)).astype(np.int32)
    scale = rng.uniform(0.001, 0.01, (TOKENS, K // block)).astype(np.float32)
    return q, scale, q.reshape(TOKENS, -1, block).sum(2, dtype=np.int32)


@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize("name", isa.available())
def test_ternary_products(name, profile):
    in_flight = isa.PRIMITIVES[isa.SETS[name][0]].bytes.in_flight // (2 if profile == "exact" else 1)
    for tokens in {1, in_flight}:
        function, engine = native(ternary_tile, name, profile, tokens)
        for group, block in ((256, 256), (64, 32), (256, 32)):
            for kind in ("random", "largest", "smallest"):
                rng = np.random.default_rng(group + block)
                codes = rng.integers(-1, 2, (16, K)).astype(np.int8)
                low, high = SMALLEST[profile], LARGEST[profile]
                if kind != "random":
                    codes[:] = 1
                    low, high = (high, high) if kind == "largest" else (low, low)
                scales = rng.uniform(0.01, 0.1, (16, K // group)).astype(np.float16)
                packed = pack(TernaryMatrix(codes, scales))
                q, q_scale, q_sum = activations(rng, block, low, high)
                upper = (q + 128) >> 8 if profile == "exact" else np.zeros_like(q)
                planes = [upper.astype(np.int8), (q - 256 * upper).astype(np.int8)]
                y = np.zeros((tokens, 16), np.float32)
                at = [a.ctypes.data for a in (*packed, *planes)]
                function(
                    *at, K, q_scale.ctypes.data, q_sum.ctypes.data, K // block, K // group, group // block,
                    block // 16, y.ctypes.data,
                )  # fmt: skip
                assert y.tobytes() == specified(codes, scales, q, q_scale)[:tokens].tobytes(), (tokens, group, kind)
        del engine


@pytest.mark.parametrize("profile", ["exact", "fast"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", isa.available())
def test_block_products(name, bits, profile):
    """Codes over their whole range, -128 of a stranger's Q8_0 among them; planes at both ends."""
    set_class = isa.SETS[name][0]
    in_flight = together(set_class, type(PRESETS[profile].activations), bits)
    for tokens in {1, in_flight}:
        function, engine = native(q8_tile if bits == 8 else q4_tile, name, profile, tokens)
        for kind in ("random", "largest", "smallest"):
            rng = np.random.default_rng(bits)
            low, high = SMALLEST[profile], LARGEST[profile]
            codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, K)).astype(np.int8)
            codes[:2] = np.array([[-(2 ** (bits - 1))], [2 ** (bits - 1) - 1]])
            if kind != "random":
                low, high = (high, high) if kind == "largest" else (low, low)
            scales = rng.uniform(0.01, 0.1, (16, K // 32)).astype(np.float16)
            packed = pack(BlockMatrix(codes, scales, bits))
            q, q_scale, q_sum = activations(rng, 32, low, high)
            upper = (q + 128) >> 8 if profile == "exact" else np.zeros_like(q)
            planes = [q.astype(np.int16), upper.astype(np.int8), (q - 256 * upper).astype(np.int8)]
            y = np.zeros((tokens, 16), np.float32)
            at = [a.ctypes.data for a in (*packed, *planes)]
            function(*at, K, q_scale.ctypes.data, q_sum.ctypes.data, K // 32, K // 32, y.ctypes.data)
            assert y.tobytes() == specified(codes, scales, q, q_scale)[:tokens].tobytes(), (tokens, kind)
        del engine
