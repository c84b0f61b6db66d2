"""The specification itself, against fp64, exact integers and hand-written sums."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime_ref import reference
from runtime_ref.arithmetic import Int8, Int16
from tests.models import mixer
from tests.runtime_ref.small import CONFIG, TOKENS, reference_logits, source, tensors

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("function", "truth", "low", "high", "tolerance"),
    [
        (reference.exp, np.exp, -87, 88, 1e-7),
        (reference.softplus, lambda x: np.logaddexp(0, x), -80, 80, 2e-7),
        (reference.silu, lambda x: x / (1 + np.exp(-x)), -80, 80, 2e-7),
    ],
)
def test_functions_are_close_to_fp64(function, truth, low, high, tolerance):
    x = np.linspace(low, high, 100_001).astype(np.float32)
    want = truth(x.astype(np.float64))
    assert (np.abs(function(x) - want) <= tolerance * np.abs(want)).all()


def test_functions_keep_nan_and_survive_extremes():
    x = np.array([np.nan, -1e30, 1e30, -0.0, 1e-42], np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for function in (reference.exp, reference.softplus, reference.silu):
            out = function(x)
            assert np.isnan(out[0])
            assert np.isfinite(out[1:]).all()


def test_sum16_adds_in_the_documented_order():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(37) * 10.0 ** rng.integers(-6, 6, 37)).astype(np.float32)
    lanes = [np.float32(0)] * 16
    for i, value in enumerate(values):
        lanes[i % 16] = np.float32(lanes[i % 16] + value)
    for half in (8, 4, 2, 1):
        lanes = [np.float32(lanes[j] + lanes[j + half]) for j in range(half)]
    assert reference.sum16(values) == lanes[0]


@given(st.lists(finite, min_size=32, max_size=32), st.sampled_from([Int16().levels, Int8().levels]))
@settings(max_examples=60, deadline=None)
def test_quantised_activations_are_near_the_values(values, levels):
    x = np.array(values, np.float32)
    q, scale = reference.quantize(x, 32, levels)
    assert np.abs(q).max() <= levels
    largest = float(np.abs(x).max())
    if largest < 2.0**-100:
        assert not q.any()
        assert scale[0] == 0
        return
    step = largest / float(levels)
    assert scale[0] == np.float32(np.float32(largest) / levels)
    for code, value in zip(q, x, strict=True):
        assert abs(Fraction(int(code)) * Fraction(step) - Fraction(float(value))) <= Fraction(step) * Fraction(51, 100)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_bad_value_gets_the_scale_nan(bad):
    x = np.ones(64, np.float32)
    x[5] = bad
    q, scale = reference.quantize(x, 32, Int16().levels)
    assert np.isnan(scale[0])
    assert scale[1] == np.float32(1) / Int16().levels
    assert not q[:32].any()
    assert (q[32:] == 32512).all()


def test_the_product_equals_exact_rational_arithmetic():
    rng = np.random.default_rng(1)
    codes = rng.integers(-1, 2, (3, 512)).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, (3, 2)).astype(np.float16)
    q = rng.integers(-32512, 32513, 512).astype(np.int32)
    q_scales = rng.uniform(1e-4, 1e-3, 2).astype(np.float32)
    got = reference.integer_matmul(codes, scales, q, q_scales)
    for row in range(3):
        y = np.float32(0)
        for block in range(2):
            span = slice(256 * block, 256 * block + 256)
            total = sum(int(c) * int(v) for c, v in zip(codes[row, span], q[span], strict=True))
            y = np.float32(
                y + np.float32(np.float32(total) * np.float32(np.float32(scales[row, block]) * q_scales[block]))
            )
        assert got[row] == y


def test_exact_is_close_to_a_plain_fp64_forward_pass():
    """The recurrence written independently, in fp64, one sequence and plain loops over heads."""
    src, c, m = source(), CONFIG, mixer(CONFIG)
    t = tensors(CONFIG)
    dense = {n: _dense(m) for n, m in t.items()}
    conv = np.zeros((c.n_layer, m.conv_dim, m.d_conv))
    h = np.zeros((c.n_layer, m.n_heads, m.headdim, m.d_state))
    logits = []
    for token in TOKENS:
        x = dense["token_embd.weight"][token]
        for i in range(c.n_layer):
            p = {n.split(".", 2)[2]: v for n, v in dense.items() if n.startswith(f"blk.{i}.")}
            z, xbc, dt = np.split(
                p["ssm_in.weight"] @ _norm(x, p["attn_norm.weight"]), [m.d_inner, m.d_inner + m.conv_dim]
            )
            conv[i] = np.concatenate([conv[i][:, 1:], xbc[:, None]], axis=1)
            xbc = _silu((conv[i] * p["ssm_conv1d.weight"]).sum(axis=1) + p["ssm_conv1d.bias"])
            b, cc = xbc[m.d_inner :].reshape(2, m.n_groups, m.d_state)
            dt = np.logaddexp(0, dt + p["ssm_dt.bias"])
            y = np.empty((m.n_heads, m.headdim))
            for head in range(m.n_heads):
                group, xh = head * m.n_groups // m.n_heads, xbc[head * m.headdim : (head + 1) * m.headdim]
                h[i, head] = h[i, head] * np.exp(dt[head] * p["ssm_a"][head, 0]) + np.outer(dt[head] * xh, b[group])
                y[head] = h[i, head] @ cc[group] + p["ssm_d"][head, 0] * xh
            gated = (y.reshape(-1) * _silu(z)).reshape(m.n_groups, -1)
            normed = _norm(gated, p["ssm_norm.weight"].reshape(m.n_groups, -1)).reshape(-1)
            x = x + p["ssm_out.weight"] @ normed
        logits.append(dense["token_embd.weight"] @ _norm(x, dense["output_norm.weight"]))
    want = np.array(logits)
    assert np.abs(reference_logits(src, "exact", TOKENS) - want).max() < 1e-3 * want.std()
    assert np.abs(reference_logits(src, "fast", TOKENS) - want).max() < 0.2 * want.std()


def _dense(value):
    if isinstance(value, np.ndarray):
        return value.astype(np.float64)
    width = value.codes.shape[1] // value.scales.shape[1]
    return value.codes.astype(np.float64) * np.repeat(value.scales.astype(np.float64), width, axis=1)


def _norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def _silu(x):
    return x / (1 + np.exp(-x))
