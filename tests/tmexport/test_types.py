"""Every kind in every container that says it holds it: nothing is lost, and the bytes are those of the format."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import RANDOM, random_binary, random_blocks, random_ternary
from tmexport.errors import CheckpointError, GGUFError, NotTernaryError
from tmexport.types import (
    CONTAINERS,
    KINDS,
    GGMLType,
    container,
    decode_codes,
    decode_values,
    encode_codes,
    smallest_exact,
    widest_exact,
)
from tmexport.types.binary import BinaryTensor

HELD = [(kind, c.type) for c in CONTAINERS.values() for kind in c.kinds]
# general.file_type as llama.cpp's own Python names it; Q1_0's is newer than that list (llama.h: MOSTLY_Q1_0 = 40)
FILE_TYPES = {"Q4_0": 2, "F16": 1, "TQ1_0": 36, "TQ2_0": 37, "Q1_0": 40, "Q2_0": 41, "Q8_0": 7}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(HELD), st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 2))
def test_codes_come_back_from_every_container(held, seed, n, groups):
    kind, where = held
    tensor = RANDOM[kind](n, 256 * groups, seed)
    if tensor.group_size < where.block_size:  # a block stores one scale
        tensor = type(tensor)(tensor.codes, np.repeat(tensor.scales[:, ::2], 2, axis=1), tensor.group_size)
    raw = encode_codes(tensor, where, "w")
    assert raw.shape == (n, where.row_bytes(256 * groups))
    codes, scales = decode_codes(raw, where, 256 * groups)
    assert np.array_equal(codes, tensor.codes)
    wanted = np.repeat(tensor.scales, tensor.group_size, axis=1)
    assert np.array_equal(np.repeat(scales, where.block_size, axis=1), wanted)
    assert np.array_equal(decode_values(raw, where, 256 * groups), tensor.codes * wanted.astype(np.float32))


def test_sizes_and_file_types_are_those_of_ggml():
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()} | {42: (64, 18)}  # not in gguf 0.19
    for kind, found in CONTAINERS.items():
        assert theirs[kind] == (kind.block_size, kind.block_bytes)
        assert found.file_type == FILE_TYPES.get(kind.name)
    for name, value in FILE_TYPES.items():
        known = getattr(gguf.LlamaFileType, f"MOSTLY_{name}", None)
        assert known is None or known == value


def test_q1_0_read_one_weight_at_a_time():
    """fp16 d, then 16 bytes: bit 1 = +d, 0 = -d, lowest bit first (llama.cpp, block_q1_0)."""
    tensor = random_binary(3, 512, 7)
    raw = encode_codes(tensor, GGMLType.Q1_0, "w").tobytes()
    for row in range(3):
        for column in range(512):
            block = (row * 4 + column // 128) * 18
            d = np.frombuffer(raw[block : block + 2], "<f2")[0]
            bit = raw[block + 2 + column % 128 // 8] >> (column % 8) & 1
            assert (2 * bit - 1, d) == (tensor.codes[row, column], tensor.scales[row, column // 128])


@pytest.mark.parametrize(
    ("kind", "where"), [("ternary", "Q4_0"), ("binary", "Q4_0"), ("int4", "Q4_0"), ("int8", "Q8_0")]
)
def test_gguf_reads_our_blocks_as_code_times_scale(kind, where):
    tensor = RANDOM[kind](5, 512, 3)
    raw = encode_codes(tensor, GGMLType[where], "w")
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[where])
    assert np.array_equal(values, tensor.codes * np.repeat(tensor.scales, tensor.group_size, axis=1).astype(np.float32))


@pytest.mark.parametrize("kind", list(KINDS))
def test_packing_for_a_checkpoint_and_reading_it_exactly(kind):
    tensor, known = RANDOM[kind](4, 512, 5), KINDS[kind]
    packed = known.pack(tensor.codes)
    assert packed.shape == (4, 512 // known.per_byte)
    assert np.array_equal(known.unpack(packed, "w"), tensor.codes)
    if known.exact is None:  # values do not tell codes from scales
        return
    again = known.exact(tensor.dense(), "w", tensor.group_size)
    assert np.array_equal(again.codes, tensor.codes)
    assert np.array_equal(again.scales, tensor.scales)
    rounded = known.quantize(np.full((1, 256), -0.25, np.float32), known.group_sizes[-1])
    assert (rounded.dense() == -0.25).all()


def test_rounding_into_blocks_one_weight_at_a_time():
    """The scale is an fp16 by the rule; no other code in the range is nearer to the weight."""
    rng = np.random.default_rng(4)
    weight = (rng.standard_normal((6, 96)) * 10.0 ** rng.integers(-6, 3, (6, 1))).astype(np.float32)
    weight[0, :32] = 0
    weight[1, :2] = (9e4, -9e4)  # a tie; int4's scale would overflow nothing, int8's neither
    for kind, steps in (("int8", 127), ("int4", -8)):
        tensor = KINDS[kind].quantize(weight, 32).check("w")
        for row, block in np.ndindex(6, 3):
            part = weight[row, 32 * block : 32 * block + 32].astype(np.float64)
            extreme = np.abs(part).max()
            if kind == "int4" and part.min() == -extreme:
                extreme = -extreme
            scale = tensor.scales[row, block]
            assert scale == np.float16(np.float32(extreme) / np.float32(steps))
            tried = np.abs(part[:, None] - float(scale) * np.arange(tensor.allowed[0], tensor.allowed[-1] + 1))
            chosen = np.abs(part - float(scale) * tensor.codes[row, 32 * block : 32 * block + 32])
            assert (chosen <= tried.min(axis=1) * (1 + 1e-6) + 1e-12 * abs(extreme)).all()
    assert not np.signbit(tensor.scales[0, 0])


def test_blocks_that_are_no_kind():
    good = random_blocks(2, 64, "int4")
    for codes, scale, message in (
        (8, 1.0, "a code lies outside -8 to"),
        (1, np.nan, "finite"),
        (1, -0.0, "other than -0"),
    ):
        codes, scales = np.full_like(good.codes, codes), np.full_like(good.scales, scale)
        with pytest.raises(CheckpointError, match=message):
            type(good)(codes, scales, 32).check("w")
    with pytest.raises(CheckpointError, match="non-zero codes but the scale 0"):
        type(good)(np.ones_like(good.codes), np.zeros_like(good.scales), 32).check("w")
    with pytest.raises(NotTernaryError, match="values do not say which int8 codes"):
        widest_exact(np.ones((1, 32), np.float32), "w", "int8")


def test_the_sign_of_zero_is_plus():
    weight = np.zeros((1, 128), np.float32)
    weight[0, :64] = -2.0
    found = KINDS["binary"].quantize(weight, 128)
    assert found.scales.tolist() == [[1.0]]  # mean |w|
    assert found.codes[0].tolist() == [-1] * 64 + [1] * 64


def test_the_smallest_container_that_is_exact():
    assert smallest_exact("ternary", 256, [768, 1536]) is GGMLType.TQ1_0
    assert smallest_exact("ternary", 256, [576, 1152]) is GGMLType.Q2_0  # no multiples of 256
    assert smallest_exact("ternary", 64, [768]) is GGMLType.Q2_0
    assert smallest_exact("binary", 128, [768]) is GGMLType.Q1_0
    assert smallest_exact("binary", 128, [576]) is GGMLType.Q2_0
    assert smallest_exact("ternary", 256, [100]) is None
    assert smallest_exact("int4", 32, [576, 96]) is GGMLType.Q4_0
    assert smallest_exact("int8", 32, [576]) is GGMLType.Q8_0


def test_the_command_offers_every_type():
    from tmexport.cli.gguf import gguf as command
    from tmexport.gguf.export import EMBEDDING_TYPES, TYPES

    choices = {
        option.name: set(option.type.choices) for option in command.params if option.name in ("kind", "embedding_type")
    }
    assert choices == {"kind": {"auto", *TYPES}, "embedding_type": {"auto", *EMBEDDING_TYPES}}


def test_what_does_not_fit_is_refused():
    with pytest.raises(NotTernaryError, match="is ternary, which Q1_0 does not hold exactly"):
        encode_codes(random_ternary(1, 256, 256), GGMLType.Q1_0, "w")
    with pytest.raises(NotTernaryError, match="row 0, group 0 .* is not binary"):
        KINDS["binary"].exact(np.arange(128, dtype=np.float32)[None], "w", 128)
    with pytest.raises(CheckpointError, match=r"a code lies outside -1, \+1"):
        BinaryTensor(np.zeros((1, 128), np.int8), np.ones((1, 1), np.float16), 128).check("w")
    with pytest.raises(GGUFError, match="F16, which has no codes"):
        decode_codes(np.zeros((1, 2), np.uint8), GGMLType.F16, 1)
    with pytest.raises(GGUFError, match="is not in the registry"):
        container(99)
    bad = encode_codes(random_binary(1, 128), GGMLType.Q1_0, "w")
    bad[0, :2] = (0, 0x7E)  # NaN
    with pytest.raises(GGUFError, match="row 0, block 0 has the scale nan"):
        decode_codes(bad, GGMLType.Q1_0, 128)


def test_the_names_that_scripts_outside_know():
    """tmexport.gguf.decode was where these stood: the same functions, and nothing of ours goes that way."""
    from tmexport.gguf.decode import decode_ternary, dequantize

    assert (decode_ternary, dequantize) == (decode_codes, decode_values)
    root = Path(__file__).parents[2]
    sources = [
        p
        for package in ("tmexport", "qat", "runtime_ref", "zero_shot", "scripts")
        for p in (root / package).rglob("*.py")
    ]
    assert not [p for p in sources if "gguf.decode import" in p.read_text(encoding="utf-8")]
