"""Block layouts, against gguf's own codecs and against the format read one weight at a time."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import random_ternary
from tmexport.errors import GGUFError, NotTernaryError, TmexportError
from tmexport.types import GGMLType, decode_codes, decode_values, encode_codes, encode_values

TERNARY = [GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.Q2_0]


def theirs(kind: GGMLType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType(int(kind))


@pytest.mark.parametrize("kind", [GGMLType.TQ1_0, GGMLType.TQ2_0])
def test_gguf_dequantizes_our_blocks_to_code_times_scale(kind):
    tensor = random_ternary(37, 1024, 256)
    values = gguf.quants.dequantize(encode_codes(tensor, kind, "w"), theirs(kind))
    assert np.array_equal(values, tensor.codes * np.repeat(tensor.scales, 256, axis=1).astype(np.float32))


@pytest.mark.parametrize("kind", [GGMLType.TQ1_0, GGMLType.TQ2_0])
def test_our_blocks_are_the_bytes_gguf_writes(kind):
    tensor = random_ternary(16, 768, 256)
    tensor.codes[:, ::256] = 1  # gguf takes the scale from the largest weight, so every block needs one
    assert np.array_equal(encode_codes(tensor, kind, "w"), gguf.quants.quantize(tensor.dense(), theirs(kind)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([64, 128, 256]))
def test_q2_0_read_one_weight_at_a_time(seed, group_size):
    tensor = random_ternary(3, 512, group_size, seed)
    raw = encode_codes(tensor, GGMLType.Q2_0, "w").tobytes()
    for row in range(3):
        for column in range(512):
            block = (row * 512 + column) // 64 * 18
            scale = np.frombuffer(raw[block : block + 2], "<f2")[0]
            byte = raw[block + 2 + column % 64 // 4]
            code = (byte >> (2 * (column % 4)) & 3) - 1
            assert (code, scale) == (tensor.codes[row, column], tensor.scales[row, column // group_size])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3), st.sampled_from(TERNARY))
def test_encode_and_decode_are_inverse(seed, n, groups, kind):
    tensor = random_ternary(n, 256 * groups, 256, seed)
    codes, scales = decode_codes(encode_codes(tensor, kind, "w"), kind, 256 * groups)
    assert np.array_equal(codes, tensor.codes)
    assert np.array_equal(scales, np.repeat(tensor.scales, 256 // kind.block_size, axis=1))


def test_every_base3_byte():
    """All 243 values of five digits, at every position of a block, read back by gguf."""
    digits = np.array([[value // 3**p % 3 - 1 for p in (4, 3, 2, 1, 0)] for value in range(243)], np.int8)
    codes = np.zeros((243, 256), np.int8)
    for position in range(5):
        codes[:, 32 * position : 32 * position + 32] = digits[:, position : position + 1]
        codes[:, 160 + 16 * position : 176 + 16 * position] = digits[:, position : position + 1]
    tensor = random_ternary(243, 256, 256)
    tensor.codes[:] = codes
    blocks = encode_codes(tensor, GGMLType.TQ1_0, "w")
    assert np.array_equal(np.sign(gguf.quants.dequantize(blocks, theirs(GGMLType.TQ1_0))), codes)
    assert np.array_equal(decode_codes(blocks, GGMLType.TQ1_0, 256)[0], codes)


def test_a_block_cannot_hold_two_scales():
    with pytest.raises(NotTernaryError, match="w as TQ2_0: row 0, groups 0 to 3 have different scales"):
        encode_codes(random_ternary(2, 256, 64), GGMLType.TQ2_0, "w")


@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0])
def test_float_quantisers_round_as_gguf_does(kind):
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((50, 256)) * 10.0 ** rng.integers(-3, 3, (50, 1))).astype(np.float32)
    values[0, :32] = 0
    values[1, 0] = -127.0
    values[1, 1:32] = np.arange(31) + 0.5  # halves
    ours = encode_values(values, kind, "w")
    assert np.array_equal(ours, gguf.quants.quantize(values, theirs(kind)))
    assert np.array_equal(decode_values(ours, kind, 256), gguf.quants.dequantize(ours, theirs(kind)))


@pytest.mark.parametrize("kind", [GGMLType.F16, GGMLType.BF16, GGMLType.F32])
def test_float_types_decode_as_gguf_does(kind):
    values = np.random.default_rng(4).standard_normal((5, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(values, theirs(kind)).view(np.uint8)
    assert np.array_equal(
        decode_values(blocks, kind, 64), gguf.quants.dequantize(blocks.view(np.uint8), theirs(kind)).reshape(5, 64)
    )


@pytest.mark.parametrize(
    ("kind", "place", "byte", "message"),
    [
        (GGMLType.TQ2_0, 5, 0b11, "row 0, block 0 holds the 2-bit code 3"),
        (GGMLType.Q2_0, 5, 0b11, "row 0, block 0 holds the 2-bit code 3"),
        (GGMLType.TQ1_0, 7, 1, "row 0, block 0, byte 7 is 1,"),
        (GGMLType.TQ1_0, 50, 2, "row 0, block 0, byte 50 is 2,"),
        (GGMLType.TQ1_0, 53, 0x80, "has the scale"),
        (GGMLType.TQ2_0, 65, 0x7C, "has the scale"),
        (GGMLType.Q2_0, 1, 0x00, "has the scale"),
    ],
)
def test_bytes_no_encoder_writes_are_refused(kind, place, byte, message):
    blocks = encode_codes(random_ternary(1, 256, 256), kind, "w")
    blocks[0, place] = byte
    with pytest.raises(GGUFError, match=message):
        decode_codes(blocks, kind, 256, "w")


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(TmexportError, match="overflows fp16"):
        encode_values(np.array([[70000.0]], np.float32), GGMLType.F16, "w")
    with pytest.raises(TmexportError, match="NaN or infinite"):
        encode_values(np.full((1, 32), np.nan, np.float32), GGMLType.Q8_0, "w")
    with pytest.raises(TmexportError, match="rows of 33"):
        encode_values(np.zeros((1, 33), np.float32), GGMLType.Q8_0, "w")
