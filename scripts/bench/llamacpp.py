"""The same GGUF in llama.cpp and in runtime_ref, interleaved, with the ratio of their speeds.

Example: python scripts/bench/llamacpp.py model.gguf --llama-python .lcp/bin/python -t 1,2 -r 5

llama.cpp comes from pip's `llama-cpp-python`, built natively (CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python), in
this Python or in the one --llama-python names. Each runs in a process of its own that stays alive; rounds alternate
between them, so that a machine that slows down slows both. The last line on stdout is one JSON object: per test, threads
and profile the medians of tokens a second (by the clock, and by CPU time for one thread) and their ratios.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import click

from tmexport.cli.app import run_command

LLAMA = "llama.cpp"


class Runner:
    """A process that serves one of the two runtimes."""

    def __init__(self, python: str, model: Path, who: str) -> None:
        command = [python, str(Path(__file__).with_name("serve_speed.py")), str(model), who]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._read("ready")

    def _read(self, word: str) -> list[str]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(word):
                return line.split()[1:]
        raise click.ClickException(f"{self._process.args!r} ended with code {self._process.wait()}")

    def time(self, test: str, count: int, threads: int) -> tuple[float, float]:
        """Tokens a second by the clock and by CPU time."""
        assert self._process.stdin
        self._process.stdin.write(f"{test} {count} {threads}\n")
        self._process.stdin.flush()
        clock, cpu = map(float, self._read("seconds"))
        return count / clock, count / cpu

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--llama-python", default=sys.executable, help="The Python that has llama-cpp-python.")
@click.option("-p", "prompt", default=128, show_default=True)
@click.option("-n", "count", default=32, show_default=True)
@click.option("-t", "threads", default="1,2", show_default=True)
@click.option("-r", "rounds", default=5, show_default=True)
@click.option("--profile", "profiles", default="exact,fast", show_default=True)
def main(model: Path, llama_python: str, prompt: int, count: int, threads: str, rounds: int, profiles: str) -> None:
    """Compare the speed of MODEL in llama.cpp and in runtime_ref."""
    who = [LLAMA, *profiles.split(",")]
    runners = {name: Runner(llama_python if name == LLAMA else sys.executable, model, name) for name in who}
    rows = []
    for number in map(int, threads.split(",")):
        for test, size in (("pp", prompt), ("tg", count)):
            speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in who}
            for _ in range(rounds):
                for name, runner in runners.items():
                    speeds[name].append(runner.time(test, size, number))
            clock = {name: median(s[0] for s in values) for name, values in speeds.items()}
            cpu = {name: median(s[1] for s in values) for name, values in speeds.items()} if number == 1 else {}
            for name in who[1:]:
                row = {
                    "test": f"{test}{size}",
                    "threads": number,
                    "profile": name,
                    "tokens_per_second": clock[name],
                    "llama_tokens_per_second": clock[LLAMA],
                    "ratio": clock[name] / clock[LLAMA],
                    "ratio_by_cpu_time": cpu[name] / cpu[LLAMA] if cpu else None,
                }
                rows.append(row)
                by_cpu = f" ({row['ratio_by_cpu_time']:.2f} by CPU time)" if cpu else ""
                click.echo(
                    f"{row['test']:<6} {number} thr. {name:<6} {clock[name]:8.2f} tok/s, llama.cpp {clock[LLAMA]:8.2f}: "
                    f"{row['ratio']:.2f}{by_cpu}"
                )
    for runner in runners.values():
        runner.close()
    click.echo(json.dumps({"model": str(model), "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    run_command(main, "scripts/bench/llamacpp.py")
