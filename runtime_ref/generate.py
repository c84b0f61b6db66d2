"""Continue a text with a GGUF model.

    python -m runtime_ref.generate MODEL.gguf --prompt "Fellow citizens" -n 64 --temperature 0
    python -m runtime_ref.generate --prompt "My fellow citizens"

The text goes to stdout as it is made, speeds go to stderr; --json prints one object instead.
"""

from __future__ import annotations

if __name__ == "__main__":
    from tmexport.cli import run_verb

    run_verb("generate", "python -m runtime_ref.generate")

import hashlib
import json
import sys
import time
from pathlib import Path

import click
import numpy as np

from runtime_ref.arithmetic import DEFAULT, HELP, PRESETS
from runtime_ref.command import DEMO_MODEL, compile_kernels, for_terminal
from runtime_ref.memory import MemorySize, check_memory
from runtime_ref.model import Model
from runtime_ref.sampling import Sampling
from runtime_ref.tokenizer import Tokenizer
from tmexport.errors import UsageError
from tmexport.gguf.reader import open_gguf
from tmexport.tokenizer.gguf import stop_ids


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="[MODEL.gguf]", default=DEMO_MODEL, type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option(
    "-n", "--tokens", "count", type=click.IntRange(1), default=64, show_default=True, help="Tokens to generate."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the most likely token.")
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Keep the likeliest tokens of this total probability."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep this many tokens; 0 keeps all.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random choice.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Default: the cores this process may use.")
@click.option("--profile", type=click.Choice(list(PRESETS)), default=DEFAULT, show_default=True, help=HELP)
@click.option("--tokenizer", "tokenizer_path", type=click.Path(path_type=Path),
              help="A tokenizer.json. Default: the one in the file, or else the file's own vocabulary.")  # fmt: skip
@click.option("--load-state", type=click.Path(path_type=Path), help="Continue from a saved state.")
@click.option("--save-state", type=click.Path(path_type=Path), help="Save the state when done.")
@click.option("--max-memory", type=MemorySize(), help="Refuse a model that needs more, before loading it: 512M, 1.5G.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(
    model_path: Path,
    prompt: str,
    count: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    threads: int | None,
    profile: str,
    tokenizer_path: Path | None,
    load_state: Path | None,
    save_state: Path | None,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Continue a text; it ends after -n tokens, or with the model's end-of-text token.

    Without MODEL.gguf: with the demo model that comes with the package, trained on State of the Union speeches.

    \b
    Examples:
      python -m runtime_ref.generate --prompt "My fellow citizens" --temperature 0.8 --top-p 0.95
      python -m runtime_ref.generate model.gguf --prompt "Fellow citizens" -n 64 --temperature 0.8 --top-p 0.95
    """
    if max_memory is not None:
        check_memory(model_path, max_memory, profile, states=4 if load_state or save_state else 1)
    sampling = Sampling(temperature, top_k, top_p, seed)
    file = open_gguf(model_path)
    tokenizer = Tokenizer.from_gguf(file, tokenizer_path)
    ids = tokenizer.prompt(prompt)
    if not ids:
        raise UsageError("--prompt has no tokens; give at least one character")
    model = Model.load(model_path, profile, threads)
    state = model.load_state(load_state) if load_state else model.new_state()
    compile_kernels(model)
    stop = stop_ids(file.metadata)
    digest, stream = hashlib.sha256(), tokenizer.stream()
    tokens: list[int] = []
    times = [time.perf_counter()]

    def seen(logits: np.ndarray) -> None:
        digest.update(logits.tobytes())
        if len(times) == 1:
            times.append(time.perf_counter())

    shown = for_terminal if sys.stdout.isatty() else str
    if not as_json:
        click.echo(shown(prompt), nl=False)
    for token in model.generate(ids, count, sampling, state, stop, seen):
        tokens.append(token)
        if not as_json:
            click.echo(shown(stream.push(token)), nl=False)
    end = time.perf_counter()
    if not as_json:
        click.echo(shown(stream.flush()))
    if save_state:
        model.decode(state, tokens[-1])  # the state then covers all of the text shown
        state.save(save_state)
    prompt_rate = len(ids) / (times[1] - times[0])
    rate = (len(tokens) - 1) / (end - times[1]) if len(tokens) > 1 else 0.0
    if as_json:
        result = {"text": tokenizer.decode(tokens), "tokens": tokens, "logits_sha256": digest.hexdigest(), "prompt_tokens": len(ids),
                  "prompt_tokens_per_second": prompt_rate, "tokens_per_second": rate, "profile": profile,
                  "threads": model.threads}  # fmt: skip
        click.echo(json.dumps(result))
    else:
        click.echo(
            f"prompt {len(ids)} tokens, {prompt_rate:.1f} tokens/s; generated {len(tokens)}, {rate:.1f} tokens/s",
            err=True,
        )
