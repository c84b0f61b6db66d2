"""How fast a model should run on a machine, on paper, and whether it does here. The formula: runtime_ref/bench/predict.py.

Examples:
  python scripts/bench/predict_speed.py --boards --size 370m
  python scripts/bench/predict_speed.py --size 1.3b --bandwidth 9 --gmacs 18 --threads 4
  python scripts/bench/predict_speed.py --measure --threads 1,2
  python scripts/bench/predict_speed.py --check 130m.gguf 370m.gguf --threads 1,2

--measure takes bandwidth and products from this machine by small benchmarks; --check also runs the models, and prints
predicted against measured tokens a second. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench.predict import (
    STATE_PER_PRODUCT,
    Speeds,
    Work,
    decode_seconds,
    prefill_seconds,
    work_of,
    work_of_file,
)
from scripts.bench.random_model import BODY, EMBEDDING, SIZES
from tmexport.cli.app import run_command
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model

# Assumed, not measured: GB/s of all threads, GMAC/s and G elements/s of one thread. docs/edge.md says from what.
BOARDS = {
    "Raspberry Pi 4, 4 threads": Speeds(5e9, 5e9, 0.5e9, 4),
    "Raspberry Pi 5, 4 threads": Speeds(11.6e9, 25e9, 0.7e9, 4),
    "Intel N100, 4 threads": Speeds(25e9, 30e9, 0.9e9, 4),
    "Graviton3, 1 thread": Speeds(20e9, 54e9, 1.6e9, 1),
}
PROMPT, ANSWER = 128, 32  # tokens that --check reads and generates


def measured_speeds(threads: int) -> Speeds:
    """This machine's speeds with so many threads."""
    from runtime_ref.bench.machine import hardware
    from runtime_ref.bench.rates import ternary_rate
    from runtime_ref.bench.run import measured_bandwidth
    from runtime_ref.kernels.isa import PRIMITIVES, select

    bandwidth = measured_bandwidth([threads], hardware())[threads]
    macs = ternary_rate("fast", threads) / threads
    return Speeds(bandwidth, macs, STATE_PER_PRODUCT * macs, threads, PRIMITIVES[type(select())].tables > 0)


def predicted(work: Work, profile: str, speeds: Speeds) -> dict[str, float]:
    """Tokens a second."""
    return {"decode": 1 / decode_seconds(work, profile, speeds), "prefill": 1 / prefill_seconds(work, profile, speeds)}


def check(path: Path, speeds: list[Speeds]) -> list[dict]:
    """Predicted and measured tokens a second of a model: medians by the clock; of one thread also the best by CPU time."""
    from runtime_ref.bench.measure import some_tokens
    from runtime_ref.model import Model

    work, rows = work_of_file(open_gguf(path)), []
    for profile in PRESETS:
        model = Model.load(path, profile, 1)
        model.compile()
        for speed in speeds:
            model.threads = speed.threads
            state = model.new_state()
            model.decode(state, 0)
            clock, cpu = _times(partial(model.decode, state), list(range(ANSWER)))
            prompt = some_tokens(model, PROMPT)
            long_clock, long_cpu = _times(partial(model.prefill, state), [prompt] * 3)
            seen = {"decode": (1 / clock, 1 / cpu), "prefill": (PROMPT / long_clock, PROMPT / long_cpu)}
            for test, expected in predicted(work, profile, speed).items():
                row = {"model": path.name, "profile": profile, "threads": speed.threads, "test": test,
                       "predicted": expected, "measured": seen[test][0], "ratio": expected / seen[test][0]}  # fmt: skip
                if speed.threads == 1:
                    row |= {"measured_by_cpu_time": seen[test][1], "ratio_by_cpu_time": expected / seen[test][1]}
                rows.append(row)
                also = f" ({row['ratio_by_cpu_time']:.2f} by CPU time)" if speed.threads == 1 else ""
                click.echo(f"{path.name:<14} {profile:<6} {speed.threads} thr. {test:<8} predicted {expected:8.2f} tokens/s, "
                           f"measured {seen[test][0]:8.2f}: {row['ratio']:.2f}{also}")  # fmt: skip
        model.close()
    return rows


def _times(call: Callable[[Any], object], arguments: list) -> tuple[float, float]:
    """Seconds of a call: the median by the clock, the least by CPU time (what interrupts it only adds to that)."""
    clock, cpu = [], []
    for argument in arguments:
        at, used = time.perf_counter(), time.process_time()
        call(argument)
        clock.append(time.perf_counter() - at)
        cpu.append(time.process_time() - used)
    return median(clock), min(cpu)


@click.command()
@click.argument("models", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--check", "checking", is_flag=True, help="Run MODELS and compare with what is predicted for this machine."
)
@click.option(
    "--size", "sizes", type=click.Choice(list(SIZES)), multiple=True, help="A published shape, instead of MODELS."
)
@click.option("--type", "kind", type=click.Choice(list(BODY)), default="tq2_0", show_default=True)
@click.option("--embedding-type", type=click.Choice(list(EMBEDDING)), default="q8_0", show_default=True)
@click.option("--bandwidth", type=click.FloatRange(0, min_open=True), help="GB/s that all threads read together.")
@click.option("--gmacs", type=click.FloatRange(0, min_open=True),
              help="10^9 ternary products a second of one thread, weights in cache, profile fast.")  # fmt: skip
@click.option("--elements", type=click.FloatRange(0, min_open=True),
              help=f"10^9 state elements a second of one thread.  [default: {STATE_PER_PRODUCT} times --gmacs]")  # fmt: skip
@click.option("--threads", default="1", show_default=True, help="With --measure and --check several: 1,2.")
@click.option("--measure", is_flag=True, help="Take bandwidth and products from this machine.")
@click.option("--boards", is_flag=True, help="The boards of docs/edge.md, with the speeds assumed there.")
def main(
    models: tuple[Path, ...],
    checking: bool,
    sizes: tuple[str, ...],
    kind: str,
    embedding_type: str,
    bandwidth: float | None,
    gmacs: float | None,
    elements: float | None,
    threads: str,
    measure: bool,
    boards: bool,
) -> None:
    """Predict the speed of MODELS, or of a --size, on a machine."""
    given = bandwidth is not None or gmacs is not None
    if measure + boards + given + checking != 1:
        raise click.UsageError("choose one: --bandwidth with --gmacs, --measure, --boards, or --check MODELS")
    if given and (bandwidth is None or gmacs is None):
        raise click.UsageError("--bandwidth and --gmacs belong together")
    if checking and not models:
        raise click.UsageError("--check runs models; name at least one GGUF file")
    try:
        numbers = [int(part) for part in threads.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1 or max(numbers) > 1024:
        raise click.BadParameter(f"{threads!r} is not a list of thread counts such as 1,2", param_hint="--threads")
    if checking:
        speeds = [measured_speeds(number) for number in numbers]
        _say_speeds(speeds)
        rows = [row for path in models for row in check(path, speeds)]
    else:
        works = {path.name: work_of_file(open_gguf(path)) for path in models}
        for size in sizes or (() if models else ("130m", "370m", "1.3b")):
            d_model, n_layer = SIZES[size]
            config = mamba2_model(d_model=d_model, n_layer=n_layer, vocab_size=50288)
            works[size] = work_of(config, BODY[kind], EMBEDDING[embedding_type], 64 if kind == "q2_0" else 256)
        if boards:
            machines = BOARDS
        elif measure:
            machines = {f"this machine, {n} threads": measured_speeds(n) for n in numbers}
            _say_speeds(list(machines.values()))
        else:
            assert bandwidth is not None
            assert gmacs is not None
            each = STATE_PER_PRODUCT * gmacs if elements is None else elements
            machines = {f"{n} threads": Speeds(bandwidth * 1e9, gmacs * 1e9, each * 1e9, n) for n in numbers}
        rows = [
            {"machine": machine, "model": name, "profile": profile} | predicted(work, profile, speeds)
            for machine, speeds in machines.items()
            for name, work in works.items()
            for profile in PRESETS
        ]
        for row in rows:
            click.echo(f"{row['machine']:<26} {row['model']:<12} {row['profile']:<6} predicted: decode "
                       f"{row['decode']:8.1f} tokens/s, prompt {row['prefill']:8.1f} tokens/s")  # fmt: skip
    click.echo(json.dumps({"rows": rows}))


def _say_speeds(speeds: list[Speeds]) -> None:
    for s in speeds:
        click.echo(
            f"{s.threads} threads: reads {s.bandwidth / 1e9:.1f} GB/s; {s.macs / 1e9:.1f} GMAC/s a thread in cache"
        )


if __name__ == "__main__":
    run_command(main, "scripts/bench/predict_speed.py")
