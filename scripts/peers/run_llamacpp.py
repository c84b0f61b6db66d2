"""Run a GGUF file in a stock llama.cpp (the `xllamacpp` wheel), greedily and without its log.

Example: python scripts/peers/run_llamacpp.py demo_out/student.gguf --prompt "Fellow citizens" -n 64

The last line on stdout is one JSON object, with the fields of `Completion`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, BinaryIO

import click

from tmexport.cli.app import run_command
from tmexport.errors import TmexportError


@dataclass(frozen=True)
class Completion:
    """What llama.cpp said.

    text: the continuation, without the prompt; bytes that are not UTF-8 become U+FFFD.
    tokens: its token ids. margins: by how much each led the second best, in natural logarithms of the probabilities; None
    where llama.cpp keeps them to itself (a token that ends inside a UTF-8 character).
    prompt_tokens_per_second, tokens_per_second: llama.cpp's own timings, means over the runs.
    """

    text: str
    tokens: list[int]
    margins: list[float | None]
    prompt_tokens: int
    prompt_tokens_per_second: float
    tokens_per_second: float


@contextlib.contextmanager
def _captured_output() -> Iterator[BinaryIO]:
    """A file that receives what C++ code writes to stdout and stderr while the block runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield log
        finally:
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])


def _wait_for_the_log(log: BinaryIO) -> None:
    """llama.cpp writes its log on a thread of its own: until nothing has come for a second, five in all."""
    size, still = -1, 0
    for _ in range(50):
        found = os.fstat(log.fileno()).st_size
        still = still + 1 if found == size and found else 0
        if still == 10:
            return
        size = found
        time.sleep(0.1)


def _reason(log: BinaryIO) -> str:
    """llama.cpp's own words for why it did not load a file."""
    _wait_for_the_log(log)
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if " E " in line]
    loading = [line for line in lines if "error loading model: " in line]
    if loading:
        return loading[0].split("error loading model: ", 1)[1]
    return lines[0].split(" E ", 1)[1].strip() if lines else "no reason given"


def complete(model: Path, prompt: str, n: int, threads: int = 1, runs: int = 1) -> Completion:
    """Continue `prompt` by the most probable token, n times or until the end-of-text token.

    The tokens come from a first run that also asks for probabilities; the timings from `runs` further ones that do not.

    Raises:
        TmexportError: llama.cpp does not load the file or refuses the request; with its reason.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_parallel = 1
    parameters.n_ctx = max(512, len(prompt.encode()) + n + 1)  # no token is shorter than a byte
    parameters.n_gpu_layers = 0
    parameters.warmup = False
    parameters.verbosity = 1  # errors alone
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    request = {"prompt": prompt, "max_tokens": n, "temperature": 0, "cache_prompt": False}
    with _captured_output() as log:
        try:
            server = xllamacpp.Server(parameters)
        except RuntimeError:
            raise TmexportError(f"{model}: llama.cpp does not load it: {_reason(log)}") from None
        answers = [server.handle_completions(request | {"logprobs": 2, "return_tokens": True, "verbose": True})]
        answers += [server.handle_completions(request) for _ in range(runs)]
        del server  # its threads write to the log while they stop
    for answer in answers:
        if "error" in answer:
            raise TmexportError(f"{model}: llama.cpp refuses the prompt: {answer['error']['message']}")
    first = answers[0]
    steps = first["choices"][0]["logprobs"]["content"]
    timings = [answer["timings"] for answer in answers[1:]] or [first["timings"]]
    return Completion(
        text=first["choices"][0]["text"],
        tokens=first["__verbose"]["tokens"],
        margins=_margins(first["__verbose"]["tokens"], steps),
        prompt_tokens=first["usage"]["prompt_tokens"],
        prompt_tokens_per_second=mean(timing["prompt_per_second"] for timing in timings),
        tokens_per_second=mean(timing["predicted_per_second"] for timing in timings),
    )


def _margins(tokens: list[int], steps: list[dict[str, Any]]) -> list[float | None]:
    """For each token, the lead over the second best; `steps` may lack some of the tokens."""
    margins: list[float | None] = []
    left = iter(steps)
    step = next(left, None)
    for token in tokens:
        if step is not None and step["id"] == token:
            best, second = step["top_logprobs"][:2]
            margins.append(best["logprob"] - second["logprob"])
            step = next(left, None)
        else:
            margins.append(None)
    return margins


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("-n", "n", default=64, show_default=True, help="Tokens to generate.")
@click.option("--threads", default=1, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Timed runs; the mean is reported.")
def main(model: Path, prompt: str, n: int, threads: int, runs: int) -> None:
    """Continue a prompt with a stock llama.cpp, greedily.

    Example: python scripts/peers/run_llamacpp.py demo_out/student.gguf --prompt "Fellow citizens" -n 64
    """
    click.echo(json.dumps(asdict(complete(model, prompt, n, threads, runs))))


if __name__ == "__main__":
    run_command(main, "scripts/peers/run_llamacpp.py")
