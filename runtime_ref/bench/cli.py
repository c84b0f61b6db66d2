"""The command: its options, a progress bar, and the forms of its result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench.compare import compare
from runtime_ref.bench.peers import PeerSettings, compare_peers, measurements
from runtime_ref.bench.peers.show import table
from runtime_ref.bench.report import page
from runtime_ref.bench.show import draw, show, show_ratios
from runtime_ref.bench.workloads import WORKLOADS
from runtime_ref.memory import MemorySize, check_memory
from tmexport.cli.progress import progress_bar
from tmexport.errors import UsageError
from tmexport.files import atomic_write


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,2") from None
    if min(numbers) < (0 if parameter.name == "depths" else 1):
        raise click.BadParameter(f"{value!r} holds a number that is too small")
    if parameter.name == "threads" and max(numbers) > 1024:
        raise click.BadParameter(f"{value!r} holds more than 1024 threads")
    return list(dict.fromkeys(numbers))


def _names(allowed: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def parse(ctx: click.Context, parameter: click.Parameter, value: str) -> list[str]:
        names = list(dict.fromkeys(value.split(","))) if value else []
        if not set(names) <= set(allowed):
            raise click.BadParameter(f"{value!r}; expected {' or '.join(allowed)}, or several with commas")
        return names

    return parse


def _check_outputs(report: Path | None, plot: Path | None, log: Path | None) -> None:
    """What cannot be written is refused before the minutes of measuring, not after them."""
    for path in (report, plot, log):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UsageError(f"{path}: cannot be written; expected the name of a file in a folder that exists")
    if plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed; --report needs nothing")


def _compare_peers(model: Path, settings: PeerSettings, log_path: Path | None, as_json: bool) -> None:
    with open(log_path or os.devnull, "w") as log, progress_bar("starting", measurements(settings)) as bar:
        result = compare_peers(model, settings, log, lambda what, done: bar.advance(done, what))
    click.echo(json.dumps(result) if as_json else table(result))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL.gguf", required=False, type=click.Path(path_type=Path))
@click.option("-p", "prompt", type=click.IntRange(1), default=128, show_default=True, help="Tokens of the prompt test.")
@click.option(
    "-n", "count", type=click.IntRange(1), default=64, show_default=True, help="Tokens of the generation test."
)
@click.option("-d", "before", type=click.IntRange(0), default=0, show_default=True,
              help="With --peers: tokens read before those of the generation test.")  # fmt: skip
@click.option("-t", "--threads", default="1,2", show_default=True, callback=_numbers, help="Numbers of threads.")
@click.option("-r", "repeats", type=click.IntRange(1), default=5, show_default=True, help="Repeats of each test.")
@click.option(
    "--profile",
    "profiles",
    default=",".join(PRESETS),
    show_default=True,
    callback=_names(tuple(PRESETS)),
    help="Presets to time.",
)
@click.option("--depth", "depths", default="0,1000,8000", show_default=True, callback=_numbers,
              help="Context lengths at which a decoded token is timed.")  # fmt: skip
@click.option("--chunks", default="1,8,32,128,512", show_default=True, callback=_numbers,
              help="Lengths of the pieces in which a prompt is read.")  # fmt: skip
@click.option("--workloads", default="", callback=_names(tuple(WORKLOADS)),
              help="Also time chat (a turn from a saved state), document (8k tokens, then an answer), stream (deadlines).")  # fmt: skip
@click.option("--workload-scale", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
              help="Shorter workloads, for a slow board.")  # fmt: skip
@click.option("--max-memory", type=MemorySize(), help="Refuse a model that needs more, before loading it: 512M, 1.5G.")
@click.option("--report", type=click.Path(path_type=Path), help="Write a page (HTML) with tables and charts.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a PNG of the results (needs matplotlib).")
@click.option("--compare", "pair", nargs=2, type=click.Path(path_type=Path), metavar="A.json B.json",
              help="Measure nothing: ratios B / A of two results of --json.")  # fmt: skip
@click.option("--peers", is_flag=True, help="Compare with every other runtime that is installed, interleaved.")
@click.option("--llama-python", help="With --peers: a Python that has a native llama-cpp-python.")
@click.option("--llama-bench", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="With --peers: the llama-bench of a llama.cpp or of a fork.")  # fmt: skip
@click.option("--log", "log_path", type=click.Path(dir_okay=False, path_type=Path),
              help="With --peers: write every measurement, and what the others print.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    model_path: Path | None,
    prompt: int,
    count: int,
    before: int,
    threads: list[int],
    repeats: int,
    profiles: list[str],
    depths: list[int],
    chunks: list[int],
    workloads: list[str],
    workload_scale: float,
    max_memory: int | None,
    report: Path | None,
    plot: Path | None,
    pair: tuple[Path, Path] | None,
    peers: bool,
    llama_python: str | None,
    llama_bench: Path | None,
    log_path: Path | None,
    as_json: bool,
) -> None:
    """Time MODEL.gguf: prompt and generation speed, latency, load time, memory, share of the memory bandwidth.

    \b
    Examples:
      tmexport bench model.gguf -p 128 -n 64 -t 1,2 -r 5 --profile exact,fast --json
      tmexport bench model.gguf --workloads chat,document,stream --report bench.html
      tmexport bench model.gguf --peers --llama-python lcp/bin/python -r 5 --log peers.log
      tmexport bench --compare before.json after.json
    """
    if pair:
        if model_path:
            raise UsageError(f"--compare reads two results; it cannot time {model_path} as well")
        ratios = compare(*pair)
        if as_json:
            rows = [vars(ratio) | {"ratio": ratio.ratio} for ratio in ratios]
            click.echo(json.dumps({"a": str(pair[0]), "b": str(pair[1]), "rows": rows}))
        else:
            show_ratios(ratios)
        return
    if model_path is None:
        raise UsageError("missing MODEL.gguf, the model to time (or --compare A.json B.json)")
    if not profiles:
        raise UsageError(f"--profile is empty; expected {', '.join(PRESETS)}, or several with commas")
    _check_outputs(report, plot, log_path)
    if peers:
        asked = PeerSettings(prompt, count, threads, repeats, profiles, llama_python, llama_bench, before)
        _compare_peers(model_path, asked, log_path, as_json)
        return
    if llama_python or llama_bench or log_path or before:
        raise UsageError("-d, --llama-python, --llama-bench and --log belong to --peers")
    from runtime_ref.bench.run import Settings, run_bench

    settings = Settings(prompt, count, threads, repeats, profiles, depths, chunks, workloads, workload_scale)
    if max_memory is not None:
        for profile in profiles:
            check_memory(model_path, max_memory, profile, settings.states(), len(profiles))
    with progress_bar("starting", settings.tokens()) as bar:
        result = run_bench(model_path, settings, lambda what, done: bar.advance(done, what))
    if report:
        with atomic_write(report) as file:
            file.write(page(result).encode("utf-8", "replace"))  # a path may be any bytes
    if plot:
        draw(result, plot)
    if as_json:
        click.echo(json.dumps(result))
    else:
        show(result)
