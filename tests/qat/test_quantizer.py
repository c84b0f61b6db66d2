"""The fake-quantiser against tmexport.types.ternary, exact arithmetic, and the exported checkpoint."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.model import LanguageModel, load_model
from qat.quantizer import (
    QUANTIZERS,
    LearnedTernaryWeight,
    TernaryWeight,
    make_low_bit,
    model_tensors,
    quantized_weights,
    zero_ratios,
)
from tests.qat.tiny import tiny_config
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import UsageError
from tmexport.types import KINDS


def test_every_kind_has_a_quantizer():
    assert set(QUANTIZERS) == set(KINDS)


FORMS = [(kind, size) for kind in KINDS for size in KINDS[kind].group_sizes]


@pytest.mark.parametrize(("kind", "group_size"), FORMS)
def test_equals_the_exporter_where_sums_are_exact(kind, group_size):
    # Multiples of 2^-8 below 1: sums of 256 of them are exact in fp32, so no order of summation can matter.
    weight = (np.random.default_rng(0).integers(-256, 257, (24, 512)) / 256).astype(np.float32)
    wanted = KINDS[kind].quantize(weight, group_size)
    got = QUANTIZERS[kind](group_size).quantize(torch.from_numpy(weight))
    assert np.array_equal(got.codes, wanted.codes)
    assert np.array_equal(got.scales.view(np.uint16), wanted.scales.view(np.uint16))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-7, 1e-4, 0.02, 1.0, 1e4, 1e6]), st.sampled_from(FORMS))
def test_equals_the_exporter_within_one_rounding(seed, spread, form):
    kind, group_size = form
    weight = (np.random.default_rng(seed).standard_normal((8, 512)) * spread).astype(np.float32)
    wanted = KINDS[kind].quantize(weight, group_size)
    module = QUANTIZERS[kind](group_size)
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


@pytest.mark.parametrize("learned", [False, True])
def test_compiled_weights_are_those_that_are_exported(learned):
    """inductor leaves out a rounding to fp16 and back, which every scale goes through."""
    torch.manual_seed(0)
    weight = torch.randn(8, 128) * 0.03
    module = LearnedTernaryWeight(64, weight) if learned else TernaryWeight(64)
    compiled = torch.compile(lambda w: module(w) * 2)
    assert np.array_equal(compiled(weight).detach().numpy(), 2 * module.quantize(weight).dense())


def test_gradient_passes_straight_through():
    weight = torch.randn(4, 128, requires_grad=True)
    upstream = torch.randn(4, 128)
    (TernaryWeight(64)(weight) * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


def test_exported_checkpoint_is_what_computed(tiny_model, tmp_path):
    make_low_bit(tiny_model, "ternary", 128)
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
    make_low_bit(tiny_model, "ternary", 256)
    module = next(iter(tiny_model.projections().values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.weight.dtype == torch.float32
    assert len(quantized_weights(tiny_model)) == 4


@pytest.mark.parametrize("group_size", [32, 100, 512])
def test_refuses_group_sizes(tiny_model, group_size):
    with pytest.raises(UsageError, match="64, 128 or 256"):
        make_low_bit(tiny_model, "ternary", group_size)
    with pytest.raises(UsageError, match="expected 128"):
        make_low_bit(tiny_model, "binary", group_size)


def test_binary_values():
    """Signs of a group of 128, +1 for both zeros; one scale; the gradient passes straight through."""
    weight = torch.full((1, 128), -0.5)
    weight[0, :4] = torch.tensor([0.0, -0.0, 0.75, 0.25])  # mean |w| = 63 / 128
    weight.requires_grad_(True)
    module = QUANTIZERS["binary"](128)
    stored = module.quantize(weight).check("w")
    assert stored.codes[0, :5].tolist() == [1, 1, 1, 1, -1]
    assert float(stored.scales[0, 0]) == 63 / 128
    dense = module(weight)
    assert dense.detach()[0].tolist() == [63 / 128] * 4 + [-63 / 128] * 124
    upstream = torch.randn(1, 128)
    (dense * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_low_bit_embedding_and_head_are_in_the_checkpoint(tmp_path, kind, tied):
    torch.manual_seed(5)
    model = LanguageModel(tiny_config(d_model=128, vocab_size=64, tie_embeddings=tied))
    size = min(128, KINDS[kind].group_sizes[0])
    make_low_bit(model, kind, size, ternary_embedding=size == 128)
    ids = torch.randint(0, 64, (2, 9))
    model(ids).square().sum().backward()
    if size == 128:
        assert model.backbone.embeddings.parametrizations.weight.original.grad.abs().sum() > 0
    write_checkpoint(tmp_path, model.config, model_tensors(model))
    checkpoint = open_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    embedding = {"kind": "ternary", "group_size": 128}
    wanted = {role: {"kind": kind, "group_size": size} for role in ("in_proj", "out_proj")}
    if size == 128:
        wanted |= {"embedding": embedding} | ({} if tied else {"head": embedding})
    assert raw["version"] == 2
    assert raw["weights"] == wanted
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            assert np.array_equal(checkpoint.dense(f"{name}.weight"), module.weight.detach().numpy()), name
    again = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))
    assert set(zero_ratios(model)) == {name.removesuffix(".weight") for name in quantized_weights(model)}


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
