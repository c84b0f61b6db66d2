"""The command: what to measure, in which order, and how the result is given."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click

from runtime_ref.bench.machine import machine
from runtime_ref.bench.measure import Row, peak_rss, time_decode, time_depths, time_prefill
from runtime_ref.bench.show import draw, show
from runtime_ref.command import compile_kernels
from runtime_ref.kernels.bandwidth import read_bandwidth
from runtime_ref.model import Model
from tmexport.errors import UsageError


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,2") from None
    if min(numbers) < (0 if parameter.name == "depths" else 1):
        raise click.BadParameter(f"{value!r} holds a number that is too small")
    return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL.gguf", type=click.Path(path_type=Path))
@click.option("-p", "prompt", type=click.IntRange(1), default=128, show_default=True, help="Tokens of the prompt test.")
@click.option(
    "-n", "count", type=click.IntRange(1), default=64, show_default=True, help="Tokens of the generation test."
)
@click.option("-t", "threads", default="1,2", show_default=True, callback=_numbers, help="Numbers of threads.")
@click.option("-r", "repeats", type=click.IntRange(1), default=5, show_default=True, help="Repeats of each test.")
@click.option("--profile", "profiles", default="exact,fast", show_default=True)
@click.option("--depth", "depths", default="0,1000,8000", show_default=True, callback=_numbers,
              help="Context lengths at which a decoded token is timed.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG of the results.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model_path: Path,
    prompt: int,
    count: int,
    threads: list[int],
    repeats: int,
    profiles: str,
    depths: list[int],
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time MODEL.gguf: prompt and generation speed, latency, load time, memory, share of the memory bandwidth.

    \b
    Example:
      python -m runtime_ref.bench model.gguf -p 128 -n 64 -t 1,2 -r 5 --profile exact,fast --json
    """
    names = profiles.split(",")
    if not set(names) <= {"exact", "fast"}:
        raise UsageError(f"--profile is {profiles!r}; expected exact, fast or exact,fast")
    with ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn")
    ) as other:  # keeps its buffer out of our peak memory
        bandwidth = dict(zip(threads, other.map(read_bandwidth, threads), strict=True))
    rows: list[Row] = []
    loads: dict[str, dict[str, float]] = {}
    depth_ms: dict[str, dict[str, float]] = {}
    for name in names:
        start = time.perf_counter()
        model = Model.load(model_path, name, max(threads))
        loaded = time.perf_counter() - start
        compiled = compile_kernels(model)
        model.decode(model.new_state(), 0)
        loads[name] = {"load_s": loaded, "compile_s": compiled, "first_token_s": time.perf_counter() - start}
        for number in threads:
            model.threads = number
            _say(as_json, f"{name}, {number} threads ...")
            rows.append(time_prefill(model, prompt, repeats))
            rows.append(time_decode(model, count, repeats, bandwidth[number]))
        _say(as_json, f"{name}, depths {depths} ...")
        depth_ms[name] = time_depths(model, depths, count)
        model.close()
        del model
    result = {
        "rows": [asdict(row) for row in rows],
        "machine": machine() | {"read_bytes_per_second": {str(t): b for t, b in bandwidth.items()}},
        "model": str(model_path),
        "file_bytes": model_path.stat().st_size,
        "load": loads,
        "depth_ms": depth_ms,
        "peak_rss_bytes": peak_rss(),
    }
    if plot:
        draw(result, plot)
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result)


def _say(quiet: bool, text: str) -> None:
    if not quiet or sys.stderr.isatty():
        click.echo(text, err=True)
