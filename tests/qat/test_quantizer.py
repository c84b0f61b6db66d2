"""The fake-quantiser against tmexport.types.ternary, exact arithmetic, and the exported checkpoint."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.quantizer import (
    LearnedTernaryWeight,
    TernaryWeight,
    make_ternary,
    model_tensors,
    quantized_weights,
    zero_ratios,
)
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import UsageError
from tmexport.types.ternary import quantize_absmean


@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_equals_the_exporter_where_sums_are_exact(group_size):
    # Multiples of 2^-8 below 1: sums of 256 of them are exact in fp32, so no order of summation can matter.
    weight = (np.random.default_rng(0).integers(-256, 257, (24, 512)) / 256).astype(np.float32)
    wanted = quantize_absmean(weight, group_size)
    got = TernaryWeight(group_size).quantize(torch.from_numpy(weight))
    assert np.array_equal(got.codes, wanted.codes)
    assert np.array_equal(got.scales.view(np.uint16), wanted.scales.view(np.uint16))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-7, 1e-4, 0.02, 1.0, 1e4, 1e6]), st.sampled_from([64, 128, 256]))
def test_equals_the_exporter_within_one_rounding(seed, spread, group_size):
    weight = (np.random.default_rng(seed).standard_normal((8, 512)) * spread).astype(np.float32)
    wanted = quantize_absmean(weight, group_size)
    module = TernaryWeight(group_size)
    got = module.quantize(torch.from_numpy(weight)).check("w")
    distance = np.abs(got.scales.view(np.uint16).astype(int) - wanted.scales.view(np.uint16).astype(int))
    assert distance.max() <= 1  # the order of an fp32 sum may move a scale to the neighbouring fp16
    same = np.repeat(distance == 0, group_size, axis=1)
    assert np.array_equal(got.codes[same], wanted.codes[same])
    assert same.mean() > 0.9
    dense = module(torch.from_numpy(weight)).numpy()
    assert np.array_equal(dense, got.dense())


def test_known_values():
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([8.0, -8.0, 8.0, 8.0])  # mean |w| = 32 / 64 = 0.5
    weight[0, 4:8] = torch.tensor([0.25, -0.25, 0.2501, -0.2501])  # halves go to even: 0.25 / 0.5 -> 0
    weight[0, 0] -= 1.0002  # keep the sum at 32 exactly
    got = TernaryWeight(64).quantize(weight)
    assert float(got.scales[0, 0]) == 0.5
    assert got.codes[0, :9].tolist() == [1, -1, 1, 1, 0, 0, 1, -1, 0]


def test_all_zero_group_gets_the_smallest_scale():
    got = TernaryWeight(64).quantize(torch.zeros(2, 64))
    assert (got.scales == np.float16(2.0**-14)).all()
    assert not got.codes.any()


def test_gradient_passes_straight_through():
    weight = torch.randn(4, 128, requires_grad=True)
    upstream = torch.randn(4, 128)
    (TernaryWeight(64)(weight) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_exported_checkpoint_is_what_computed(tiny_model, tmp_path):
    make_ternary(tiny_model, 128)
    write_checkpoint(tmp_path, tiny_model.config, model_tensors(tiny_model))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.group_size == 128
    modules = tiny_model.projections()
    assert len(modules) == 2 * tiny_model.config.n_layer
    ratios = zero_ratios(tiny_model)
    for name, module in modules.items():
        stored = checkpoint.dense(f"{name}.weight")
        assert np.array_equal(stored, module.weight.detach().numpy())
        assert ratios[name] == pytest.approx(float((stored == 0).mean()), abs=1e-9)
    latent = dict(tiny_model.named_parameters())["backbone.layers.0.mixer.in_proj.parametrizations.weight.original"]
    assert latent.dtype == torch.float32
    assert not torch.equal(latent, modules["backbone.layers.0.mixer.in_proj"].weight)


def test_autocast_keeps_the_weight_fp32(tiny_model):
    make_ternary(tiny_model, 256)
    module = next(iter(tiny_model.projections().values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.weight.dtype == torch.float32
    assert len(quantized_weights(tiny_model)) == 4


@pytest.mark.parametrize("group_size", [32, 100, 512])
def test_refuses_group_sizes(tiny_model, group_size):
    with pytest.raises(UsageError, match="64, 128 or 256"):
        make_ternary(tiny_model, group_size)


def test_learned_scale_has_the_gradient_of_lsq():
    torch.manual_seed(0)
    weight = torch.randn(3, 128, requires_grad=True)
    module = LearnedTernaryWeight(64, weight)
    assert torch.equal(module(weight).detach(), TernaryWeight(64)(weight).detach())  # it starts at mean|w|
    with torch.no_grad():
        module.scale.mul_(1.5)
    stored = module.quantize(weight.detach()).check("w")
    assert np.array_equal(module(weight).detach().numpy(), stored.dense())
    upstream = torch.randn(3, 128)
    (module(weight) * upstream).sum().backward()
    scale = torch.from_numpy(stored.scales.astype(np.float32)).repeat_interleave(64, 1)
    codes = torch.from_numpy(stored.codes.astype(np.float32))
    ratio = weight.detach() / scale
    inside = ratio.abs() < 1
    wanted = torch.where(inside, codes - ratio, codes) * upstream
    torch.testing.assert_close(module.scale.grad, wanted.view(3, 2, 64).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight.grad, torch.where(inside, upstream, 0.0))
