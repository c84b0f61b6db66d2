"""Recipes: defaults, file, flags; bounds; the learning rate."""

import itertools
import math

import pytest

from qat.recipe import Recipe, load_recipe
from tmexport.errors import UsageError


def test_flags_win_over_the_file_over_defaults(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("[student]\nsteps = 50\nlr = 1\n")
    recipe = load_recipe(str(path), "student", {"steps": 70, "seed": None})
    assert (recipe.steps, recipe.lr, recipe.seed, recipe.kd_weight) == (70, 1.0, 0, 0.5)
    path.write_text(recipe.to_toml("student"))
    assert load_recipe(str(path), "student", {}) == recipe


def test_tokens_become_steps():
    recipe = load_recipe(None, "student", {"tokens": 100_000, "batch_size": 4, "seq_len": 100})
    assert recipe.steps == 250


@pytest.mark.parametrize("table", ["teacher", "student"])
def test_shipped_recipes_load(table):
    assert load_recipe("demo-cpu", table, {}).steps > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[student]\nstep = 5\n", "unknown key 'step'"),
        ("[teacher]\nsteps = 5\n", r"has no table \[student\]; found teacher"),
        ("steps = \n", "is not a TOML file"),
        ("[student]\nsteps = 'five'\n", "steps is 'five'; expected a value of type int"),
        ("[student]\nkd_weight = 1.5\n", "kd_weight is 1.5; expected a number from 0 to 1"),
        ("[student]\nlr = nan\n", "lr is nan"),
        ("[student]\ndtype = 'int8'\n", "dtype is 'int8'"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    path = tmp_path / "r.toml"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_recipe(str(path), "student", {})
    with pytest.raises(UsageError, match="no such recipe; known by name: .*demo-cpu"):
        load_recipe("nonsense", "student", {})


def test_learning_rate_rises_then_falls():
    recipe = Recipe(steps=101, warmup=0.1, lr=2.0, final_lr=0.1)
    rates = [recipe.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0)
    assert rates[10] == pytest.approx(2.0)
    assert rates[100] == pytest.approx(0.2)
    assert rates[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
