"""A form in onnxruntime, the same weights as TQ2_0 in llama.cpp and in runtime_ref: speed, load time, memory, sizes.

    python scripts/bench/onnx_forms.py --size 1.3b --llama-python .lcp/bin/python --work /tmp/bench -t 1,2 -r 5
    python scripts/bench/onnx_forms.py --size 130m --form custom --profile exact --work /tmp/bench

Weights are random ternary ones at a published shape (scripts/bench/random_model.py), written once into --work. Every runtime is a
process of its own that stays alive; rounds alternate between them, so that a machine that slows down slows all. llama.cpp
is pip's `llama-cpp-python` built natively, in the Python that --llama-python names; without it the ratio is left out. With
one thread the CPU time is given too: other programs on the machine do not change it much. The last line on stdout is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, cast

import click
import numpy as np

from runtime_ref.bench.measure import peak_rss
from runtime_ref.bench.peers import Sample, Worker
from runtime_ref.bench.peers.llama import library_of
from tmexport.cli.app import run_command


class Runner:
    """A process that answers "pp N THREADS" and "tg N THREADS" with "seconds CLOCK CPU"."""

    def __init__(self, *command: str) -> None:
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=null)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._asks, self._answers = self._process.stdin, self._process.stdout
        self.ready = self._read("ready")

    def _read(self, word: str) -> list[str]:
        for line in self._answers:
            if line.startswith(word):
                return line.split()[1:]
        raise click.ClickException(f"{self._process.args!r} ended with code {self._process.wait()}")

    def measure(self, test: str, count: int, threads: int) -> Sample:
        """Seconds by the clock, and of CPU time."""
        self._asks.write(f"{test} {count} {threads}\n")
        self._asks.flush()
        clock, cpu = map(float, self._read("seconds"))
        return Sample(clock, cpu)

    def close(self) -> None:
        self._asks.close()
        self._process.wait()


def serve(path: str, threads: int, profile: str) -> None:
    """The other end of a Runner, onnxruntime's or runtime_ref's; "ready" comes with the seconds of loading and the peaks of memory in
    MB, of one token and with a prefill of 128. The custom form runs with the runtime's kernels.
    """
    from runtime_ref.model import Model
    from runtime_ref.ort import OrtModel

    start, model = time.perf_counter(), cast(Any, None)
    if path.endswith(".gguf"):
        model = Model.load(path, profile, threads)
    else:
        model = OrtModel.load(path, threads, kernels=path.endswith("-custom.onnx"))
    state = model.new_state()
    model.decode(state, 0)
    seconds, first = time.perf_counter() - start, peak_rss()
    model.prefill(state, [1] * 128)
    print("ready", seconds, first / 1e6, peak_rss() / 1e6, flush=True)
    for line in sys.stdin:
        test, count, _ = line.split()
        state = model.new_state()
        model.decode(state, 0)
        clock, cpu = time.perf_counter(), time.process_time()
        if test == "pp":
            model.prefill(state, [(17 * i) % 1000 for i in range(int(count))])
        else:
            for i in range(int(count)):
                model.decode(state, (31 * i) % 1000)
        print("seconds", time.perf_counter() - clock, time.process_time() - cpu, flush=True)


def prepare(work: Path, size: str, form: str) -> dict[str, Path]:
    """The checkpoint, the GGUF and the ONNX file, written unless they are there."""
    from scripts.bench.random_model import SIZES, random_ternary, random_values
    from tmexport.checkpoint import expected_shapes, open_checkpoint, write_checkpoint
    from tmexport.gguf.export import plan_export
    from tmexport.model import mamba2_model
    from tmexport.onnx.export import export_onnx
    from tmexport.onnx.graph import build_graph
    from tmexport.types import Coded

    d_model, n_layer = SIZES[size]
    config = mamba2_model(d_model=d_model, n_layer=n_layer, vocab_size=50288)
    folder = work / f"ckpt-{size}"
    if not (folder / "model.safetensors").exists():
        rng = np.random.default_rng(0)
        tensors: dict[str, np.ndarray | Coded] = {}
        for name, shape in expected_shapes(config).items():
            if name.endswith("_proj.weight"):
                tensors[name] = random_ternary(shape, 256, rng)
            elif name.endswith("A_log"):
                tensors[name] = np.log(rng.uniform(1.0, 16.0, shape)).astype(np.float32)
            else:
                like = {"mixer.dt_bias": "ssm_dt.bias", "mixer.D": "ssm_d", "conv1d.weight": "conv1d"}
                known = next((new for old, new in like.items() if name.endswith(old)), name)
                values = random_values(known, shape, rng)
                tensors[name] = values.astype(np.float16) if "embeddings" in name else values
        write_checkpoint(folder, config, tensors)
    checkpoint, files = open_checkpoint(folder), {"gguf": work / f"{size}.gguf"}
    if not files["gguf"].exists():
        plan_export(checkpoint, "tq2_0", "q8_0").write(files["gguf"], lambda tensor: None)
    files[form] = work / f"{size}-{form}.onnx"
    if not files[form].exists():
        export_onnx(files[form], build_graph(checkpoint, form, "q8", logits="last"), None)
    return files


@click.command()
@click.option(
    "--size", type=click.Choice(["demo", "130m", "370m", "780m", "1.3b", "2.7b"]), default="1.3b", show_default=True
)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="Where the files go; kept for the next time."
)
@click.option("--form", type=click.Choice(["ort", "custom", "portable"]), default="ort", show_default=True)
@click.option("--llama-python", help="The Python that has llama-cpp-python.")
@click.option("-p", "prompt", default=128, show_default=True)
@click.option("-n", "count", default=16, show_default=True)
@click.option("-t", "threads", default="1,2", show_default=True)
@click.option("-r", "rounds", default=5, show_default=True)
@click.option("--profile", "profiles", default="fast", show_default=True, help="Of runtime_ref; empty leaves it out.")
@click.option("--serve", "served", nargs=3, type=(str, int, str), hidden=True)
def main(size: str, work: Path, form: str, llama_python: str | None, prompt: int, count: int, threads: str, rounds: int,
         profiles: str, served: tuple[str, int, str] | None) -> None:  # fmt: skip
    """Compare onnxruntime with llama.cpp and runtime_ref at a published shape."""
    if served:
        serve(*served)
        return
    work.mkdir(parents=True, exist_ok=True)
    files = prepare(work, size, form)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    click.echo("  ".join(f"{name} {n / 1e6:.1f} MB" for name, n in sizes.items()))
    rows: list[dict[str, Any]] = []
    loads: dict[str, dict[str, float]] = {}
    for number in map(int, threads.split(",")):
        served_by = {"onnxruntime": (files[form], "")}
        served_by |= {f"runtime_ref {p}": (files["gguf"], p) for p in filter(None, profiles.split(","))}
        runners: dict[str, Runner | Worker] = {}
        for name, (path, profile) in served_by.items():
            ours = Runner(sys.executable, __file__, "--work", str(work), "--serve", str(path), str(number), profile)
            seconds, peak, later = map(float, ours.ready)
            loads[f"{name}, {number} thread(s)"] = {
                "load_and_first_token_seconds": seconds,
                "peak_rss_mb": peak,
                "peak_rss_mb_after_128": later,
            }
            click.echo(
                f"{name}, {number} thread(s): loaded, one token made in {seconds:.1f} s, peak RSS {peak:.0f} MB; {later:.0f} MB after a prefill of 128"
            )
            runners[name] = ours
        if llama_python and (library := library_of("llama_cpp", llama_python)):
            what = {"kind": "llama", "library": str(library[0])}
            runners["llama.cpp"] = Worker("llama.cpp", "", files["gguf"], what, subprocess.DEVNULL)
        for test, tokens in (("pp", prompt), ("tg", count)):
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
            for _ in range(rounds):
                for name, runner in runners.items():
                    sample = runner.measure(test, tokens, number)
                    speeds[name].append((tokens / sample.seconds, tokens / (sample.cpu_seconds or np.nan)))
            for name, values in speeds.items():
                clock, cpu = (median(v[i] for v in values) for i in (0, 1))
                base_clock, base_cpu = (median(v[i] for v in speeds["onnxruntime"]) for i in (0, 1))
                row = {"test": f"{test}{tokens}", "threads": number, "runtime": name, "tokens_per_second": clock,
                       "by_cpu_time": cpu if number == 1 else None, "onnxruntime_ratio": base_clock / clock,
                       "onnxruntime_ratio_by_cpu_time": base_cpu / cpu if number == 1 else None}  # fmt: skip
                rows.append(row)
                by_cpu = f", by CPU time {cpu:7.2f}, ratio {base_cpu / cpu:.2f}" if number == 1 else ""
                click.echo(
                    f"{test}{tokens:<4} {number} thr. {name:<18} {clock:8.2f} tok/s; onnxruntime is {base_clock / clock:.2f} x{by_cpu}"
                )
        for runner in runners.values():
            runner.close()
    click.echo(json.dumps({"size": size, "bytes": sizes, "rounds": rounds, "loads": loads, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "scripts/bench/onnx_forms.py")
