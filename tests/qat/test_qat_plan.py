"""The plan of a run against transformers' parameter counts, torch's FLOP counter, what a real step keeps, and a GPU."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qat.model.mamba2
from qat.convert.shape import hybrid_of
from qat.model import LanguageModel
from qat.plan import config_of, layer_activations, make_plan
from qat.recipe import Recipe, load_recipe
from qat.train.stages import DEFAULTS, load_stages
from qat.train.step import Step, freeze
from tests.qat.tiny import tiny_config
from tmexport.errors import UsageError
from tmexport.model import llama_model


@pytest.mark.parametrize(
    # `published`: the parameters of transformers' Mamba2ForCausalLM with these dimensions, counted on the meta device
    ("name", "published"),
    [("mamba2-1.3b-h100", 1_343_757_312), ("mamba2-130m-h100", 128_989_632)],
)
def test_parameters_and_memory_of_the_shipped_recipes(name, published):
    recipe = load_recipe(name, "student", {})
    config = config_of(recipe)
    plan = make_plan(recipe, config, "h100", config)
    assert plan.parameters == published
    assert plan.memory_optimizer == 2 * plan.memory_weights == 8 * published
    assert abs(plan.tokens - 102e6) < recipe.tokens_per_step
    assert plan.fits
    assert plan.hours < 8
    assert json.dumps(plan.__dict__)


def test_flops_equal_the_counter(monkeypatch):
    monkeypatch.setattr(qat.model.mamba2, "default_chunk", lambda device: 32)  # the counted model runs on the CPU
    config = tiny_config(d_model=128, vocab_size=512, n_layer=3)
    recipe = Recipe(steps=1, batch_size=2, seq_len=128, kd_weight=0.0, group_size=128)
    model = LanguageModel(config)
    ids = torch.randint(0, 512, (2, 128))
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    plan = make_plan(recipe, config, "a100", config)
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.03)  # the counter leaves out the convolution


@pytest.mark.parametrize(
    # measured with `scripts/machines/gpu/run.py --only probe` on one H200, GB; tokens a second there
    ("stage", "gigabytes", "speed"),
    [("align", 26.5, 76_995), ("distill", 41.9, 54_041), ("ternary", 41.9, 45_588)],
)
def test_stages_against_a_gpu(stage, gigabytes, speed):
    teacher = llama_model(576, 30, 49152, 9, 1536, 3, tie_embeddings=True, eos_token_id=0)
    recipe = load_stages("scripts/machines/gpu/minutes.toml", {})[stage]
    plan = make_plan(recipe, hybrid_of(teacher, range(0, 30, 4)), "h200", teacher)
    assert plan.memory_total / 1e9 == pytest.approx(gigabytes, rel=0.08)
    assert plan.hours == pytest.approx(plan.tokens / speed / 3600, rel=0.35)


def test_flops_of_alignment_equal_the_counter(monkeypatch):
    monkeypatch.setattr(qat.model.mamba2, "default_chunk", lambda device: 32)
    teacher = llama_model(128, 3, 512, 2, 256, 1, tie_embeddings=True, eos_token_id=0)
    config = hybrid_of(teacher, [1])
    recipe = Recipe(steps=1, batch_size=2, seq_len=64, **DEFAULTS["align"])
    student, imitated = LanguageModel(config), LanguageModel(teacher).requires_grad_(False)
    freeze(student, recipe)
    with FlopCounterMode(display=False) as counter:
        Step(student, imitated, recipe)(torch.randint(0, 512, (2, 65)))[0].backward()
    plan = make_plan(recipe, config, "a100", teacher)
    # the plan counts the gradient of what in_proj reads, which the teacher's own states do not need
    assert counter.get_total_flops() < plan.flops < 1.25 * counter.get_total_flops()
    assert plan.memory_optimizer == 8 * sum(p.numel() for p in student.parameters() if p.requires_grad)


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
    plain = make_plan(Recipe(), config, "h100", config)
    saving = make_plan(Recipe(checkpoint_activations=True), config, "h100", config)
    assert saving.memory_activations < plain.memory_activations
    assert saving.flops > plain.flops
    with pytest.raises(UsageError, match="accelerator 'tpu' is not known; expected one of h100"):
        make_plan(Recipe(), config, "tpu", config)
    wide = config_of(Recipe(d_model=320))
    with pytest.raises(UsageError, match="group size 256 does not fit rows of 320"):
        make_plan(Recipe(d_model=320, group_size=256), wide, "h100", wide)
