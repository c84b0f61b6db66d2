"""The study's corrections of a rounded model: what each promises, checked on numbers made outside of it."""

import copy

import pytest
import torch

import scripts.studies.untrained
from qat.model import LanguageModel
from scripts.studies.untrained import CORRECTIONS, bias_correction, james_stein, kalman, rounded
from tests.qat.tiny import tiny_config
from tmexport.types.ternary import exact_ternary


@pytest.fixture
def setting():
    torch.manual_seed(0)
    teacher = LanguageModel(tiny_config(d_model=128, n_layer=2, vocab_size=60)).requires_grad_(False)
    return teacher, torch.randint(0, 60, (3, 40))


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_every_method_gives_ternary_projections_and_leaves_the_teacher(setting, name):
    teacher, ids = setting
    before = copy.deepcopy(teacher.state_dict())
    model = CORRECTIONS[name](teacher, ids, 64)
    for key, module in model.projections().items():
        exact_ternary(module.weight.numpy(), key, 64)  # raises if it is not
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert torch.isfinite(model(ids)).all()


def test_bias_takes_back_the_mean_error(setting):
    teacher, ids = setting
    model = bias_correction(teacher, ids, 64)
    shrunk = james_stein(teacher, ids, 64)
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
    ternary = rounded(teacher, 64)
    # Absmean of a ternary weight is not its scale, so keep the weights as they are.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts.studies.untrained, "rounded", lambda model, group_size: copy.deepcopy(model))
        model = kalman(ternary, ids, 64)
    torch.testing.assert_close(model(ids), ternary(ids))
