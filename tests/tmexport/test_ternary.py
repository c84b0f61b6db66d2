"""Codes and scales: exact readings, refusals, and the packing of the ternary checkpoint."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import random_ternary
from tmexport.errors import CheckpointError, NotTernaryError
from tmexport.types import widest_exact
from tmexport.types.ternary import (
    TernaryTensor,
    exact_ternary,
    pack_codes,
    quantize_absmean,
    unpack_codes,
)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.sampled_from([64, 128, 256]))
def test_a_ternary_matrix_survives_fp32_and_back(seed, n, groups, group_size):
    tensor = random_ternary(n, groups * group_size, group_size, seed)
    dense = tensor.dense()
    for row in range(n):  # the definition, one weight at a time, in exact arithmetic
        for column in (0, group_size - 1, groups * group_size - 1):
            assert dense[row, column] == int(tensor.codes[row, column]) * float(
                tensor.scales[row, column // group_size]
            )
    back = exact_ternary(dense, "w", group_size)
    used = (tensor.codes.reshape(n, groups, group_size) != 0).any(axis=2)
    assert np.array_equal(back.codes, tensor.codes)
    assert np.array_equal(back.scales[used], tensor.scales[used])


def test_absmean_on_numbers_worked_out_by_hand():
    # |w| = 3, 1, 0, 0, ... over 64: mean 4/64 = 0.0625, so 3 and -1 clip to +-1 and 0.03 (0.48 of a scale) rounds to 0.
    weight = np.zeros((2, 64), np.float32)
    weight[0, :2] = 3.0, -1.0
    weight[1, :] = 0.5
    weight[1, 0] = 0.25  # 0.25 / 0.496 = 0.504: up to one
    tensor = quantize_absmean(weight, 64)
    assert tensor.scales[0, 0] == np.float16(0.0625)
    assert tensor.codes[0].tolist() == [1, -1] + [0] * 62
    assert tensor.scales[1, 0] == np.float16((63 * 0.5 + 0.25) / 64)
    assert tensor.codes[1].tolist() == [1] * 64


def test_absmean_of_nothing_keeps_a_usable_scale():
    tensor = quantize_absmean(np.zeros((1, 64), np.float32), 64)
    assert tensor.scales[0, 0] == np.float16(2**-14)
    assert not tensor.codes.any()
    tensor.check("w")


def test_an_inexact_group_is_named():
    dense = random_ternary(4, 512, 256).dense()
    dense[2, 300] = 1.001 * dense[2, 256:512].max()
    with pytest.raises(NotTernaryError, match=r"^w: row 2, group 1 \(of 256\) is not ternary"):
        exact_ternary(dense, "w", 256)


@pytest.mark.parametrize("scale", [0.1, 1e-6, 1e6])  # not an fp16; a subnormal fp16; beyond fp16
def test_a_scale_that_fp16_cannot_hold_is_not_ternary(scale):
    dense = np.full((1, 64), scale, np.float32)
    with pytest.raises(NotTernaryError, match="row 0, group 0"):
        exact_ternary(dense, "w", 64)


def test_the_widest_group_that_fits_is_found():
    assert widest_exact(random_ternary(3, 512, 256).dense(), "w").group_size == 256
    assert widest_exact(random_ternary(3, 512, 128).dense(), "w").group_size == 128
    assert widest_exact(random_ternary(3, 192, 64).dense(), "w").group_size == 64


def test_packing_is_lowest_bits_first():
    assert pack_codes(np.array([[-1, 0, 1, 0, 1, 1, 1, 1]], np.int8)).tolist() == [[0b01_10_01_00, 0b10101010]]
    assert unpack_codes(np.array([[0b01_10_01_00]], np.uint8), "w").tolist() == [[-1, 0, 1, 0]]


def test_the_2_bit_value_3_is_refused():
    with pytest.raises(CheckpointError, match=r"w: row 1, column 2 holds the 2-bit value 3"):
        unpack_codes(np.array([[0], [0b00_11_00_00]], np.uint8), "w")


@pytest.mark.parametrize("bits", [0x8000, 0x0001, 0x7C00, 0x7E00, 0xBC00])  # -0, subnormal, inf, NaN, negative
def test_a_scale_that_is_not_positive_and_normal_is_refused(bits):
    tensor = random_ternary(2, 256, 64)
    tensor.scales[1, 2] = np.uint16(bits).view(np.float16)
    with pytest.raises(CheckpointError, match="w: row 1, group 2 has the scale"):
        tensor.check("w")


def test_codes_without_a_scale_are_refused():
    codes, scales = np.ones((1, 64), np.int8), np.zeros((1, 1), np.float16)
    with pytest.raises(CheckpointError, match="non-zero codes but the scale 0"):
        TernaryTensor(codes, scales, 64).check("w")
