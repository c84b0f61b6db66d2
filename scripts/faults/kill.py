"""Kill `tmexport gguf` at random moments: the final name must hold the old file or the new one, whole.

Usage: python scripts/faults/kill.py [--kills 50] [--signal KILL|INT|TERM]

Half of the signals come at any moment of the process's life, half while its temporary file is there (which is where
it matters). INT and TERM must leave nothing behind; INT exits with 130 and TERM with 143 once the command has started.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import click

from tmexport.cli.app import run_command

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "from tmexport.cli import main; main()", "gguf"]


def make_checkpoint(folder: Path, seed: int) -> Path:
    """Large enough (40 MB) that writing takes a while."""
    from tests.models import ternary_tensors
    from tmexport.checkpoint import write_checkpoint
    from tmexport.model import mamba2_model

    config = mamba2_model(d_model=512, n_layer=4, vocab_size=16384, d_state=64)
    write_checkpoint(folder, config, ternary_tensors(config, 256, seed))
    return folder


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def export(source: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*COMMAND, str(source), str(output)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip


def wait_for_temporary(folder: Path, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not any(folder.glob("*.tmp")) and not any(folder.glob(".*.tmp")):
        time.sleep(0.0005)


@click.command()
@click.option("--kills", default=50, show_default=True, help="How many signals to send.")
@click.option("--signal", "sent", type=click.Choice(["KILL", "INT", "TERM"]), default="KILL", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Seed of the random moments.")
def main(kills: int, sent: str, seed: int) -> None:
    """Kill `tmexport gguf` at random moments; the final name must hold the old file or the new one, whole."""
    rng, outcomes, codes, debris = random.Random(seed), Counter[str](), Counter[int](), 0
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "out").mkdir()
        output = work / "out" / "m.gguf"
        sources = [make_checkpoint(work / f"ckpt{i}", i) for i in range(2)]
        whole = []
        for source in sources:
            began = time.monotonic()
            export(source, output).wait()
            whole.append((digest(output), time.monotonic() - began))
        began = time.monotonic()
        process = export(sources[1], output)
        wait_for_temporary(output.parent, process)
        writing_at = time.monotonic() - began
        process.wait()
        lasts = time.monotonic() - began
        for number in range(kills):
            before = digest(output)
            old, new = (0, 1) if before == whole[0][0] else (1, 0)
            process = export(sources[new], output)
            if number % 2:
                wait_for_temporary(output.parent, process)
                time.sleep(rng.uniform(0, max(0.01, lasts - writing_at)))
            else:
                time.sleep(rng.uniform(0, lasts))
            process.send_signal(getattr(signal, f"SIG{sent}"))
            codes[process.wait()] += 1
            after = digest(output)
            if after not in (whole[old][0], whole[new][0]):
                outcomes["mixed"] += 1
            else:
                outcomes["old" if after == before else "new"] += 1
            for left in output.parent.glob(".*.tmp"):
                debris += 1
                left.unlink()
            if number % 10 == 9:
                print(f"{number + 1} of {kills}: {dict(outcomes)}", file=sys.stderr)
    failed = outcomes["mixed"] > 0 or (sent != "KILL" and debris > 0)
    print(json.dumps({"signal": sent, "kills": kills, "old": outcomes["old"], "new": outcomes["new"], "mixed": outcomes["mixed"],
                      "temporary_files_left": debris, "exit_codes": {str(k): v for k, v in sorted(codes.items())}, "ok": not failed}))  # fmt: skip
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main, "scripts/faults/kill.py")
