"""Kill training at random moments, resume it each time, and compare with a run that was left alone: bit for bit.

Usage: python scripts/faults/train.py [--kills 50]

A tiny student is distilled from a tiny random teacher. Every kill is a SIGKILL; whatever the moment, the trainer's
checkpoint must be whole, and in the end the exported checkpoint and the loss curve must be those of the undisturbed run.
The children are forked from this process before it computes anything, which spares them the import of torch.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from tmexport.cli.app import run_command

ROOT = Path(__file__).resolve().parents[2]

STEPS = 60


def prepare(work: Path) -> tuple[Path, Path]:
    """A random teacher and a text."""
    from tests.models import write_small
    from tmexport.model import mamba2_model

    config = mamba2_model(d_model=64, n_layer=1, vocab_size=512, d_state=16, headdim=32, eos_token_id=0)
    text = work / "text.jsonl"
    rows = [
        f"The union of the States is the work of the people. Year {1800 + i}: " + "peace and commerce. " * 12
        for i in range(60)
    ]
    text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return write_small(work / "teacher", config), text


def run_training(out: Path, teacher: Path, text: Path, steps: int = STEPS, hooks: Sequence[Any] = ()) -> None:
    from qat.recipe import Recipe
    from qat.train.training import train

    recipe = Recipe(
        group_size=64,
        steps=steps,
        seq_len=32,
        batch_size=4,
        lr=3e-3,
        threads=1,
        log_every=5,
        save_every=4,
        eval_every=20,
        weight_decay=0.0,
    )
    train(recipe, [text], out, teacher, held_out=[text], resume=True, hooks=hooks)


def start(action: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def results(out: Path) -> dict[str, Any]:
    """What must be equal: every exported file, and the curve without its speeds."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in lines]
    return {name: (out / name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json", "recipe.toml")} | {"curve": curve}  # fmt: skip


def checkpoint_is_whole(out: Path) -> None:
    """In a child of its own: this process must stay one that can be forked."""
    import torch

    latest = out / "checkpoints" / "latest.pt"
    if latest.exists():
        state = torch.load(latest, weights_only=True)
        assert 0 < state["step"] <= STEPS
        assert set(state) == {"model", "step", "best", "recipe", "inputs", "optimizer"}


@click.command()
@click.option("--kills", "wanted", default=50, show_default=True, help="How many signals to send.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random moments.")
def main(wanted: int, seed: int) -> None:
    """Kill training at random moments and resume it each time; the result must be that of a run left alone."""
    rng, damaged, finished_early, longest = random.Random(seed), 0, 0, 0
    import qat.train.training  # noqa: F401 - once, for every child

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        teacher, text = prepare(work)
        began = time.monotonic()
        assert wait(start(lambda: run_training(work / "whole", teacher, text))) == 0
        whole, duration = results(work / "whole"), time.monotonic() - began
        round_, kills, unequal = 0, 0, 0
        while kills < wanted:
            out = work / f"killed{round_}"
            done = False
            while not done and kills < wanted:
                pid = start(partial(run_training, out, teacher, text))
                time.sleep(rng.uniform(0.1, 0.8) * duration)
                os.kill(pid, signal.SIGKILL)
                code = wait(pid)
                done = code == 0  # it was done before the signal
                kills += not done
                finished_early += done
                damaged += wait(start(partial(checkpoint_is_whole, out))) != 0
                if kills % 10 == 0:
                    print(f"{kills} of {wanted}", file=sys.stderr)
            assert wait(start(partial(run_training, out, teacher, text))) == 0
            unequal += results(out) != whole
            longest = max(longest, len(whole["curve"]))
            round_ += 1
    failed = damaged + unequal > 0
    print(json.dumps({"kills": kills, "runs": round_, "damaged_checkpoints": damaged, "runs_not_identical": unequal, "steps": longest, "ok": not failed}))  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main, "scripts/faults/train.py")
