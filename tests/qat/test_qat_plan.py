"""The plan of a run against transformers' parameter counts, torch's FLOP counter and what a real step keeps."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qat.model.mamba2
from qat.model import LanguageModel
from qat.plan import config_of, layer_activations, make_plan
from qat.recipe import Recipe, load_recipe
from tests.qat.tiny import tiny_config
from tmexport.errors import UsageError


@pytest.mark.parametrize(
    # `published`: the parameters of transformers' Mamba2ForCausalLM with these dimensions, counted on the meta device
    ("name", "published"),
    [("mamba2-1.3b-h100", 1_343_757_312), ("mamba2-130m-h100", 128_989_632)],
)
def test_parameters_and_memory_of_the_shipped_recipes(name, published):
    recipe = load_recipe(name, "student", {})
    config = config_of(recipe)
    plan = make_plan(recipe, config, "h100", True)
    assert plan.parameters == published
    assert plan.memory_optimizer == 2 * plan.memory_weights == 8 * published
    assert abs(plan.tokens - 102e6) < recipe.tokens_per_step
    assert plan.fits
    assert plan.hours < 4
    assert json.dumps(plan.__dict__)


def test_flops_equal_the_counter(monkeypatch):
    monkeypatch.setattr(qat.model.mamba2, "default_chunk", lambda device: 32)  # the counted model runs on the CPU
    config = tiny_config(d_model=128, vocab_size=512, n_layer=3)
    recipe = Recipe(steps=1, batch_size=2, seq_len=128, kd_weight=0.0, group_size=128)
    model = LanguageModel(config)
    ids = torch.randint(0, 512, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    plan = make_plan(recipe, config, "a100", True)
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.03)  # the counter leaves out the convolution


def test_activations_of_shapes_equal_those_of_numbers(monkeypatch):
    monkeypatch.setattr(qat.model.mamba2, "default_chunk", lambda device: 64)  # or the meta device takes a GPU's
    config = tiny_config()
    real, meta = (LanguageModel(config).backbone.layers[0] for _ in range(2))
    meta.to("meta")
    seen = {}
    own = {p.data_ptr() for p in real.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        real(torch.randn(2, 96, 64, requires_grad=True))
    counted = sum(t.untyped_storage().nbytes() for t in seen.values())
    entering, kept = layer_activations(meta, 2, 96, 64, False)
    assert entering == 2 * 96 * 64 * 4
    assert kept == pytest.approx(counted, rel=0.02)


def test_recomputing_saves_memory_and_unknown_accelerators_are_refused():
    config = config_of(Recipe())
    plain = make_plan(Recipe(), config, "h100", True)
    saving = make_plan(Recipe(checkpoint_activations=True), config, "h100", True)
    assert saving.memory_activations < plain.memory_activations
    assert saving.flops > plain.flops
    with pytest.raises(UsageError, match="accelerator 'tpu' is not known; expected one of h100"):
        make_plan(Recipe(), config, "tpu", True)
    with pytest.raises(UsageError, match="group size 256 does not fit rows of 320"):
        make_plan(Recipe(d_model=320, group_size=256), config_of(Recipe(d_model=320)), "h100", True)
