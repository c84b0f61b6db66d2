"""Peak memory and time of exporting a checkpoint of the mamba2-1.3b shape (random weights, real dimensions).

    python scripts/bench/measure_export.py [--work DIR] [--layers 48]

Four checkpoints: ternary; the same dequantised to fp16 (recognised as ternary); floating point fp16 in safetensors; and
the latter as state-spaces' pytorch_model.bin. Needs about 9 GB of disk for as long as it runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from tests.models import random_tensors, random_ternary, write_state_spaces
from tmexport.checkpoint import write_checkpoint
from tmexport.cli.app import run_command
from tmexport.model import mamba2_model

RUNS = [
    ("ternary", ["--type", "auto", "--embedding-type", "q8_0"]),
    ("ternary", ["--type", "tq2_0", "--embedding-type", "q8_0"]),
    ("dequantised", ["--type", "auto", "--embedding-type", "q8_0"]),
    ("float", ["--type", "f16"]),
    ("float", ["--ptq", "rtn"]),
    ("state-spaces", ["--type", "f16"]),
]


def prepare(folder: Path, layers: int) -> int:
    """Write the four checkpoints; returns the bytes of the largest tensor (the fp16 embedding)."""
    config = mamba2_model(d_model=2048, n_layer=layers, vocab_size=50288)
    one = mamba2_model(d_model=2048, n_layer=1, vocab_size=50288)
    layer = {name: values.astype(np.float16) for name, values in random_tensors(one).items()}
    prefix = "backbone.layers.0."
    dense = {n: v for n, v in layer.items() if not n.startswith(prefix)}
    dense |= {
        n.replace("layers.0.", f"layers.{i}."): v
        for n, v in layer.items()
        if n.startswith(prefix)
        for i in range(layers)
    }
    write_checkpoint(folder / "float", config, dense)
    write_state_spaces(folder / "state-spaces", config, dense, vocab_size=50277)
    shapes = {p: layer[f"{prefix}mixer.{p}_proj.weight"].shape for p in ("in", "out")}
    ternary = {p: random_ternary(n, k, 256) for p, (n, k) in shapes.items()}
    projections = set(config.projections)
    tensors = {n: ternary[n.split("_proj")[0].rsplit(".", 1)[1]] if n in projections else v for n, v in dense.items()}
    write_checkpoint(folder / "ternary", config, tensors)
    halves = {p: t.dense().astype(np.float16) for p, t in ternary.items()}
    tensors = {n: halves[n.split("_proj")[0].rsplit(".", 1)[1]] if n in projections else v for n, v in dense.items()}
    write_checkpoint(folder / "dequantised", config, tensors)
    return dense["backbone.embeddings.weight"].nbytes


def export(checkpoint: Path, options: list[str], output: Path) -> dict[str, object]:
    """Run `tmexport gguf` in its own process."""
    code = (
        "import re, resource, sys; from tmexport.cli import cli; cli(sys.argv[1:], standalone_mode=False); "
        "used = resource.getrusage(resource.RUSAGE_SELF); "  # its ru_maxrss would count the parent before exec
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], used.ru_utime + used.ru_stime)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, "gguf", str(checkpoint), str(output), "--json", *options],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - start
    listing, usage = done.stdout.strip().rsplit("\n", 1)
    result, (peak, cpu_seconds) = json.loads(listing), usage.split()
    return {
        "checkpoint": checkpoint.name,
        "options": " ".join(options),
        "type": result["type"],
        "megabytes": round(result["bytes"] / 1e6, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(float(cpu_seconds), 1),
        "peak_megabytes": round(int(peak) * 1024 / 1e6),
    }


@click.command()
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder for the checkpoints; a temporary one otherwise.",
)
@click.option("--layers", default=48, show_default=True)
def main(work: Path | None, layers: int) -> None:
    """Measure exports of the mamba2-1.3b shape; prints a line a run, then one JSON object."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        largest = prepare(folder, layers)
        rows = []
        for checkpoint, options in RUNS:
            rows.append(export(folder / checkpoint, options, folder / "out.gguf"))
            click.echo(rows[-1], err=True)
        limit = round(2 * largest / 1e6 + 500)
        click.echo(json.dumps({"limit_megabytes": limit, "limit_seconds": 60, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "scripts/bench/measure_export.py")
