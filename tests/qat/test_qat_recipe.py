"""Recipes: defaults, file, flags; bounds; the learning rate."""

import itertools
import math
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qat.recipe import Recipe, known_recipes, load_recipe
from tmexport.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


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
    assert "demo-cpu" in known_recipes()


def test_recipes_are_in_the_package(tmp_path):
    """A copy of the installed files alone, outside of any checkout, finds them by name."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for pattern in ("*.py", *pyproject["tool"]["setuptools"]["package-data"]["qat"]):
        for file in (ROOT / "qat").glob(pattern):
            (tmp_path / "qat" / file.relative_to(ROOT / "qat")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, tmp_path / "qat" / file.relative_to(ROOT / "qat"))
    code = "import qat, qat.recipe as r; print(qat.__file__, r.known_recipes(), r.load_recipe('demo-cpu', 'student', {}).steps)"
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))  # tmexport comes from the checkout
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
                          capture_output=True, text=True, check=True)  # fmt: skip
    steps = tomllib.loads((ROOT / "qat/recipes/demo-cpu.toml").read_text())["student"]["steps"]
    names = sorted(path.stem for path in (ROOT / "qat" / "recipes").glob("*.toml"))
    assert done.stdout.strip() == f"{tmp_path / 'qat' / '__init__.py'} {names} {steps}"


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
