"""Training killed with SIGKILL and resumed gives the bits of a run left alone. scripts/faults/train.py does it fifty times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qat.recipe import Recipe
from tests.models import SMALL
from tmexport.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: a process in which torch has computed cannot be forked safely.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from scripts.faults import train as fault
from qat.train.hooks import Hook
import matplotlib.pyplot

work = Path(sys.argv[1])
teacher, text = fault.prepare(work)

class Kill(Hook):
    def after_step(self, training):
        if training.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

def killed_while_saving():
    replace = os.replace
    def fatal(source, target):
        if str(target).endswith("latest.pt"):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    import tmexport.files
    tmexport.files.os.replace = fatal
    fault.run_training(work / "killed", teacher, text, 8)

codes = [fault.wait(fault.start(lambda: fault.run_training(work / "whole", teacher, text, 8)))]
for action in (killed_while_saving, lambda: fault.run_training(work / "killed", teacher, text, 8, [Kill()]), lambda: fault.run_training(work / "killed", teacher, text, 8)):
    codes.append(fault.wait(fault.start(action)))
print(json.dumps([codes, fault.results(work / "killed") == fault.results(work / "whole"), len(fault.results(work / "whole")["curve"])]))
"""


def test_killed_twice_and_resumed(tmp_path):
    """While the first checkpoint takes its name, and after a checkpoint but before the next."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    codes, identical, steps = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, -9, -9, 0], done.stderr
    assert steps == 8
    assert identical


@pytest.mark.parametrize(
    "content",
    [[], {"step": 3}, {"recipe": 3}, 7, {"recipe": {}, "model": {}, "optimizer": {}, "step": 0, "best": 0}],
    ids=repr,
)
def test_a_trainers_checkpoint_that_is_none(tmp_path, content):
    from qat.model import LanguageModel
    from qat.train.saving import load_state
    from qat.train.step import make_optimizer

    torch.save(content, tmp_path / "latest.pt")
    model, recipe = LanguageModel(SMALL), Recipe()
    with pytest.raises(UsageError, match="latest.pt: (is damaged or not a checkpoint|was made with)"):
        load_state(tmp_path / "latest.pt", model, make_optimizer(model, recipe), recipe, {}, resume=True)
