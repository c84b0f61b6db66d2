"""Models whose blocks are not all alike, and Mamba-1: the kernels' bits are the specification's, however a text is cut."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from runtime_ref.arithmetic import PRESETS
from runtime_ref.model import Model
from runtime_ref.state import State
from runtime_ref.weights import memory_source
from tests.models import mixer
from tests.runtime_ref.small import CONFIG, TOKENS, all_logits, matrix, reference_logits, tensors
from tmexport.errors import GGUFError
from tmexport.model import Block
from tmexport.model.branches.mamba1 import Mamba1

MAMBA1 = Mamba1(d_model=256, d_inner=512, dt_rank=20)
WIDE = Mamba1(d_model=256, d_inner=256, dt_rank=16, d_state=32, d_conv=3)
OTHER = replace(mixer(CONFIG), d_inner=256, headdim=32, n_groups=1, d_conv=2)
MODELS = {
    "mamba1": (MAMBA1, MAMBA1),
    "mamba1 of two shapes": (MAMBA1, WIDE, MAMBA1),
    "mamba2 of two shapes": (mixer(CONFIG), OTHER, mixer(CONFIG), OTHER),
    "both": (MAMBA1, mixer(CONFIG), WIDE, OTHER),
}


def model_of(*branches):
    return replace(CONFIG, blocks=tuple(Block((branch,)) for branch in branches))


@pytest.mark.parametrize("profile", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_the_specification(name, profile):
    config = model_of(*MODELS[name])
    src = memory_source(config, tensors(config, "ternary64"))
    wanted = reference_logits(src, profile, TOKENS)
    model = Model(src, profile, threads=2)
    assert all_logits(model, TOKENS).tobytes() == wanted.tobytes()
    states = [model.new_state() for _ in range(3)]
    for state, cut in zip(states, (1, 4, 9), strict=True):
        model.prefill(state, TOKENS[:cut])
        for token in TOKENS[cut:-1]:
            model.decode(state, token)
    assert model.decode_batch(states, [TOKENS[-1]] * 3).tobytes() == np.stack([wanted[-1]] * 3).tobytes()


def test_a_type_for_each_layer():
    config = model_of(*[mixer(CONFIG)] * 4)
    named = tensors(config)
    rng = np.random.default_rng(3)
    for i, kind in enumerate(("ternary64", "q8_0", "q4_0", "f16")):
        for part, spec in (("ssm_in", "in_proj"), ("ssm_out", "out_proj")):
            (shape,) = (s.shape for s in mixer(CONFIG).tensors() if s.role == spec)
            named[f"blk.{i}.{part}.weight"] = matrix(rng, *shape, kind)
    src = memory_source(config, named)
    for profile in PRESETS:
        model, wanted = Model(src, profile, 1), reference_logits(src, profile, TOKENS)
        assert all_logits(model, TOKENS[:3]).tobytes() == wanted[:3].tobytes()
        if profile != "compact":  # whose products are those of `fast`
            model.compile()  # the code for many rows, which shapes its tiles by their number
        for count in (4, 8, len(TOKENS)):
            assert all_logits(model, TOKENS[:count]).tobytes() == wanted[:count].tobytes()


def test_a_saved_state_of_different_blocks(tmp_path):
    config = model_of(*MODELS["both"])
    model = Model(memory_source(config, tensors(config, "ternary64")), "exact", 1)
    state = model.new_state()
    model.prefill(state, TOKENS[:5])
    state.save(tmp_path / "s.state")
    again = State.load(tmp_path / "s.state", model.new_state())
    assert model.prefill(again, TOKENS[5:]).tobytes() == model.prefill(state, TOKENS[5:]).tobytes()


@dataclass(frozen=True)
class Unknown:
    kind: ClassVar[str] = "convnet"


def test_branches_without_kernels_are_refused_by_name():
    with pytest.raises(GGUFError, match="the model: has convnet layers, which this runtime does not compute"):
        Model(memory_source(model_of(mixer(CONFIG), Unknown()), tensors(CONFIG)))


@pytest.mark.parametrize("wrong", [{"d_inner": 520}, {"d_state": 8}])
def test_sizes_that_the_vectors_do_not_divide_are_refused(wrong):
    config = model_of(replace(MAMBA1, **wrong))
    with pytest.raises(GGUFError, match=f"{next(iter(wrong))} is .* this runtime needs a multiple of 16"):
        Model(memory_source(config, tensors(config, "f16")))
