"""The training-free methods: what each promises, checked on numbers made outside of it."""

import copy

import numpy as np
import pytest
import torch

import qat.baselines
from qat.baselines import METHODS, gptq_weight, ternary_of
from qat.model import LanguageModel
from tests.qat.tiny import tiny_config
from tmexport.types.ternary import exact_ternary, quantize_absmean


@pytest.fixture
def setting():
    torch.manual_seed(0)
    teacher = LanguageModel(tiny_config(d_model=128, n_layer=2, vocab_size=60)).requires_grad_(False)
    return teacher, torch.randint(0, 60, (3, 40))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_gives_ternary_projections_and_leaves_the_teacher(setting, name):
    teacher, ids = setting
    before = copy.deepcopy(teacher.state_dict())
    model = METHODS[name](teacher, ids, 64)
    for key, module in model.projections().items():
        exact_ternary(module.weight.numpy(), key, 64)  # raises if it is not
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert torch.isfinite(model(ids)).all()


def test_rounding_is_absmean(setting):
    weight = setting[0].backbone.layers[0].mixer.in_proj.weight
    assert np.array_equal(ternary_of(weight, 64).numpy(), quantize_absmean(weight.numpy(), 64).dense())


def test_gptq_lowers_the_error_of_the_output():
    torch.manual_seed(1)
    weight = torch.randn(32, 128)
    x = torch.randn(500, 16) @ torch.randn(16, 128) + 0.3 * torch.randn(500, 128)  # correlated inputs
    moments = x.double().T @ x.double()
    error = {
        "rtn": ((weight - ternary_of(weight, 64)) @ x.T).square().mean(),
        "gptq": ((weight - gptq_weight(weight, moments, 64)) @ x.T).square().mean(),
    }
    assert error["gptq"] < 0.5 * error["rtn"]
    # Uncorrelated inputs leave nothing to correct.
    assert torch.equal(gptq_weight(weight, torch.eye(128, dtype=torch.float64), 64), ternary_of(weight, 64))


def test_awq_scaling_is_exact_without_rounding(setting, monkeypatch):
    teacher, ids = setting
    seen = []

    def nearly_exact(weight, group_size):  # the error falls with every try, so the strongest scaling is chosen
        seen.append(1)
        return weight * (1 + 1e-3 / len(seen))

    monkeypatch.setattr(qat.baselines, "ternary_of", nearly_exact)
    model = qat.baselines.awq(teacher, ids, 64)
    for ours, theirs in zip(model.backbone.layers, teacher.backbone.layers, strict=True):
        assert not torch.equal(ours.norm.weight, theirs.norm.weight)
        assert not torch.equal(ours.mixer.norm.weight, theirs.mixer.norm.weight)
    torch.testing.assert_close(model(ids), teacher(ids), rtol=2e-2, atol=2e-3)


def test_sigma_delta_bounds_the_sum_of_errors(setting):
    teacher, ids = setting
    model = qat.baselines.sigma_delta(teacher, ids, 64)
    shaped, nearest = [], []
    for key, module in model.projections().items():
        original = teacher.projections()[key].weight
        shaped.append((original - module.weight).sum(1).abs().mean())
        nearest.append((original - ternary_of(original, 64)).sum(1).abs().mean())
    assert torch.stack(shaped).mean() < 0.3 * torch.stack(nearest).mean()


def test_bias_takes_back_the_mean_error(setting):
    teacher, ids = setting
    model = qat.baselines.bias_correction(teacher, ids, 64)
    shrunk = qat.baselines.james_stein(teacher, ids, 64)
    x = torch.nn.functional.rms_norm(teacher.backbone.embeddings(ids), (128,), eps=1e-5)  # the first norm's weight is 1
    first = "backbone.layers.0.mixer.in_proj"
    ours, theirs = model.projections()[first], teacher.projections()[first]
    error = (theirs(x) - ours(x)).mean((0, 1))
    assert error.abs().max() < 1e-5
    ratio = shrunk.projections()[first].bias / ours.bias
    assert ratio.std() < 1e-5
    assert 0 < ratio.mean() < 1


def test_kalman_gain_is_one_for_a_teacher_that_is_ternary(setting):
    teacher, ids = setting
    ternary = qat.baselines.round_to_nearest(teacher, ids, 64)
    # Absmean of a ternary weight is not its scale, so keep the weights as they are.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qat.baselines, "ternary_of", lambda weight, group_size: weight)
        model = qat.baselines.kalman(ternary, ids, 64)
    torch.testing.assert_close(model(ids), ternary(ids))
