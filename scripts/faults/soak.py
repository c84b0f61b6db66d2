"""Load and unload a model a thousand times, then decode a million tokens: memory, descriptors and threads stay flat.

Usage: python scripts/faults/soak.py [MODEL.gguf] [--cycles 1000] [--tokens 1000000]

Without MODEL.gguf, a small random one is made. Memory is the resident anonymous memory of this process, in kilobytes,
read at twenty points of each phase; growth is the mean of the last quarter minus that of the second one.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import click

from tmexport.cli.app import run_command

ROOT = Path(__file__).resolve().parents[2]
POINTS, ALLOWED_KB = 20, 1024


def memory() -> tuple[int, int, int]:
    """Anonymous resident kilobytes, open descriptors, threads."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    numbers = [int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "Threads")]  # type: ignore[index]
    return numbers[0], len(os.listdir("/proc/self/fd")), numbers[1]


def growth(points: list[tuple[int, int, int]]) -> dict[str, float]:
    quarter = len(points) // 4
    late, early = points[-quarter:], points[quarter : 2 * quarter]
    changes = [round(mean(p[i] for p in late) - mean(p[i] for p in early), 1) for i in range(3)]
    return dict(zip(("anonymous_kb", "descriptors", "threads"), changes, strict=True)) | {"first_kb": points[0][0], "last_kb": points[-1][0]}  # fmt: skip


@click.command()
@click.argument(
    "model_path", metavar="[MODEL.gguf]", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--cycles",
    type=click.IntRange(POINTS),
    default=1000,
    show_default=True,
    help="Cycles of loading, decoding one token and unloading.",
)
@click.option("--tokens", type=click.IntRange(POINTS), default=1_000_000, show_default=True, help="Tokens to decode.")
@click.option("--threads", "-t", default=1, show_default=True, help="CPU threads.")
def main(model_path: Path | None, cycles: int, tokens: int, threads: int) -> None:
    """Load and unload MODEL.gguf (default: a small random one), then decode: memory must stay flat."""
    import numpy as np

    from runtime_ref.model import Model
    from tests.hostile.builders import TQ2_0, model

    with tempfile.TemporaryDirectory() as scratch:
        path = model_path or Path(scratch) / "m.gguf"
        if model_path is None:
            path.write_bytes(model(TQ2_0, vocab=256, state=16).build())
        began, loads = time.monotonic(), []
        for cycle in range(cycles):
            loaded = Model.load(path, threads=threads)
            loaded.decode(loaded.new_state(), 1)
            loaded.close()
            del loaded
            if cycle % max(1, cycles // POINTS) == 0:
                loads.append(memory())
        print(f"{cycles} cycles in {time.monotonic() - began:.0f} s", file=sys.stderr)
        loaded, decodes, token = Model.load(path, threads=threads), [], 1
        state, began = loaded.new_state(), time.monotonic()
        for position in range(tokens):
            token = int(np.argmax(loaded.decode(state, token)))
            if position % 997 == 0:
                token = position % loaded.config.vocab_size  # out of any cycle
            if position % max(1, tokens // POINTS) == 0:
                decodes.append(memory())
                print(f"{position} tokens, {decodes[-1][0]} kB", file=sys.stderr)
        seconds = time.monotonic() - began
    result = {"cycles": cycles, "load_unload": growth(loads), "tokens": tokens, "decode": growth(decodes),
              "tokens_per_second": round(tokens / seconds, 1), "state_finite": bool(np.isfinite(state.arrays["ssm"]).all())}  # fmt: skip
    grown = [growth(loads), growth(decodes)]
    result["ok"] = result["state_finite"] and all(g["anonymous_kb"] < ALLOWED_KB and g["descriptors"] < 1 and g["threads"] < 1 for g in grown)  # fmt: skip
    print(json.dumps(result))
    sys.exit(0 if result["ok"] else 1)


if __name__ == "__main__":
    run_command(main, "scripts/faults/soak.py")
