"""How fast a GGUF model runs here.

    python -m runtime_ref.bench MODEL.gguf -p 128 -n 64 -t 1,2 -r 5 --profile exact,fast

pp128: reading a prompt of 128 tokens; tg64: generating 64 tokens one by one. Tokens are arbitrary ids: speed does not
depend on them. Decoding is limited by memory, so it is compared with the read bandwidth measured in the same run.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import click
import numpy as np

from runtime_ref.command import compile_kernels, run_command
from runtime_ref.kernels.bandwidth import read_bandwidth
from runtime_ref.kernels.isa import select
from runtime_ref.model import Model
from tmexport.errors import UsageError


@dataclass(frozen=True)
class Row:
    """One test: tokens a second, mean and standard deviation over the repeats.

    For tg: latencies of a token in milliseconds, and the share of the read bandwidth (bytes_per_token * tokens a second).
    """

    test: str
    threads: int
    profile: str
    tokens_per_second: float
    spread: float
    best: float
    latency_ms: dict[str, float] | None = None
    bytes_per_token: int | None = None
    bandwidth_share: float | None = None


def _summary(rates: list[float]) -> tuple[float, float, float]:
    return mean(rates), stdev(rates) if len(rates) > 1 else 0.0, max(rates)


def time_prefill(model: Model, count: int, repeats: int) -> Row:
    """Tokens a second for a prompt of `count` tokens."""
    tokens = [(17 * i) % model.config.vocab_size for i in range(count)]
    rates = []
    for _ in range(repeats):
        state = model.new_state()
        start = time.perf_counter()
        model.prefill(state, tokens)
        rates.append(count / (time.perf_counter() - start))
    return Row(f"pp{count}", model.threads, model.profile, *_summary(rates))


def time_decode(model: Model, count: int, repeats: int, bandwidth: float) -> Row:
    """Tokens a second for `count` tokens one by one, after a first one."""
    rates: list[float] = []
    latencies: list[float] = []
    for _ in range(repeats):
        state = model.new_state()
        model.decode(state, 0)
        times = decode_times(model, state, count)
        rates.append(count / sum(times))
        latencies += times
    per_token = bytes_per_token(model)
    quantiles = {f"p{q}": float(np.percentile(latencies, q)) * 1e3 for q in (50, 90, 99)}
    share = per_token * max(rates) / bandwidth
    return Row(f"tg{count}", model.threads, model.profile, *_summary(rates), quantiles, per_token, share)


def decode_times(model: Model, state: object, count: int) -> list[float]:
    """Seconds of each of `count` decoded tokens."""
    times = []
    for i in range(count):
        start = time.perf_counter()
        model.decode(state, (31 * i) % model.config.vocab_size)  # type: ignore[arg-type]
        times.append(time.perf_counter() - start)
    return times


def bytes_per_token(model: Model) -> int:
    """Bytes that decoding a token must move: weights and head read once, the state read and written."""
    state = model.new_state()
    return model.weight_bytes + 2 * state.nbytes


def time_depths(model: Model, depths: list[int], count: int) -> dict[str, float]:
    """Median milliseconds of a token after `depth` tokens of context, by depth."""
    state, result = model.new_state(), {}
    for depth in sorted(depths):
        missing = depth - state.tokens
        if missing > 0:
            model.prefill(state, [(17 * i) % model.config.vocab_size for i in range(missing)])
        result[str(depth)] = float(np.median(decode_times(model, state.copy(), count))) * 1e3
    return result


def machine() -> dict[str, object]:
    """The processor, the instruction set in use and the library versions."""
    import numba

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":", 1)[1].strip() if lines else name
    isa = type(select()).__name__.lower()
    return {"cpu": name, "isa": isa, "numba": numba.__version__, "numpy": np.__version__, "python": platform.python_version()}  # fmt: skip


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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "rows": [asdict(row) for row in rows],
        "machine": machine() | {"read_bytes_per_second": {str(t): b for t, b in bandwidth.items()}},
        "model": str(model_path),
        "file_bytes": model_path.stat().st_size,
        "load": loads,
        "depth_ms": depth_ms,
        "peak_rss_bytes": peak,
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


def show(result: dict) -> None:
    """The results as text."""
    click.echo(f"{result['machine']['cpu']}, {result['machine']['isa']}; {result['file_bytes'] / 1e6:.1f} MB")
    click.echo(
        f"{'test':<8}{'threads':>8}  {'profile':<8}{'tokens/s':>18}{'p50 ms':>9}{'p99 ms':>9}{'of bandwidth':>14}"
    )
    for row in result["rows"]:
        rate = f"{row['tokens_per_second']:.2f} ± {row['spread']:.2f}"
        line = f"{row['test']:<8}{row['threads']:>8}  {row['profile']:<8}{rate:>18}"
        if row["latency_ms"]:
            line += f"{row['latency_ms']['p50']:>9.2f}{row['latency_ms']['p99']:>9.2f}{row['bandwidth_share']:>13.0%}"
        click.echo(line)
    for profile, times in result["load"].items():
        depths = ", ".join(f"{depth}: {ms:.2f}" for depth, ms in result["depth_ms"][profile].items())
        click.echo(
            f"{profile}: load {times['load_s']:.2f} s, first token after {times['first_token_s']:.2f} s; ms a token at depth {depths}"
        )
    click.echo(f"peak memory {result['peak_rss_bytes'] / 1e6:.0f} MB")


def draw(result: dict, path: Path) -> None:
    """Bars of the speeds, and the time of a token by depth."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tmexport.files import atomic_write

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = [f"{r['test']}\n{r['profile']}, {r['threads']} thr." for r in result["rows"]]
    rates = [r["tokens_per_second"] for r in result["rows"]]
    left.bar(range(len(rates)), rates, yerr=[r["spread"] for r in result["rows"]], color="#4878a8")
    left.set_xticks(range(len(rates)), labels, fontsize=7)
    left.set(ylabel="tokens / s", title=Path(result["model"]).name)
    for profile, times in result["depth_ms"].items():
        right.plot([int(d) for d in times], list(times.values()), marker="o", label=profile)
    right.set(xlabel="tokens of context", ylabel="ms a token", title="Decoding does not slow down with depth")
    right.set_ylim(bottom=0)
    right.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    with atomic_write(path) as file:
        file.write(image.getvalue())


if __name__ == "__main__":
    run_command(bench, "runtime_ref.bench")
