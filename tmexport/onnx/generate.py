"""Continue a text with a file written by `tmexport onnx`.

    python -m tmexport.onnx.generate model.onnx --prompt "Fellow citizens" -n 64

The text goes to stdout as it is made, speeds go to stderr; --json prints one object instead.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import click
import numpy as np

from runtime_ref.ort.model import OrtModel, check_temperature
from tmexport.errors import TmexportError, TokenizerError, UsageError
from tmexport.onnx.names import tokenizer_path
from tmexport.tokenizer.names import end_tokens
from tmexport.tokenizer.parse import parse_tokenizer

_LONGEST_CHARACTER = 8  # tokens held back for an unfinished character before it is shown as it is


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model_path", metavar="MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text to continue.")
@click.option("-n", "--tokens", "count", type=click.IntRange(1), default=64, show_default=True, help="Tokens to make.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0: always the most likely token.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random choice.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Of onnxruntime. Default: its own choice.")
@click.option("--kernels", is_flag=True, help="Compute a custom form with runtime_ref's bit-exact arithmetic.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Default: MODEL.tokenizer.json beside the file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(
    model_path: Path,
    prompt: str,
    count: int,
    temperature: float,
    seed: int,
    threads: int | None,
    kernels: bool,
    tokenizer: Path | None,
    as_json: bool,
) -> None:
    """Continue a text with MODEL.onnx; it ends after -n tokens, or with the model's end-of-text token.

    \b
    Example:
      python -m tmexport.onnx.generate model.onnx --prompt "Fellow citizens" -n 64 --temperature 0.8
    """
    check_temperature(temperature)
    where = tokenizer or tokenizer_path(model_path)
    if not model_path.is_file():
        raise UsageError(f"{model_path}: no such file; expected a file written by `tmexport onnx`")
    try:
        text = where.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{where}: cannot be read: {error}; name one with --tokenizer") from None
    codec = parse_tokenizer(text, str(where))
    ids = codec.encode(prompt).ids  # with the tokens that its post-processor adds, such as BOS
    if not ids:
        raise UsageError("--prompt has no tokens; give at least one character")
    model = OrtModel.load(model_path, threads, kernels)
    stop = end_tokens(codec.get_vocab(with_added_tokens=True), model.config.eos_token_id)
    digest, tokens, times = hashlib.sha256(), [], [time.perf_counter()]
    shown = 0  # characters of the continuation that are on the screen

    def seen(logits: np.ndarray) -> None:
        digest.update(logits.tobytes())
        if len(times) == 1:
            times.append(time.perf_counter())

    if not as_json:
        click.echo(prompt, nl=False)
    pending = 0
    for token in model.generate(ids, count, temperature, seed, stop=stop, on_logits=seen):
        tokens.append(token)
        if not as_json:
            so_far = codec.decode(tokens, skip_special_tokens=True)
            pending += 1
            if not so_far.endswith("\ufffd") or pending >= _LONGEST_CHARACTER:
                click.echo(so_far[shown:], nl=False)
                shown, pending = len(so_far), 0
    end = time.perf_counter()
    continuation = codec.decode(tokens, skip_special_tokens=True)
    prompt_rate = len(ids) / (times[1] - times[0])
    rate = (len(tokens) - 1) / (end - times[1]) if len(tokens) > 1 else 0.0
    if as_json:
        result = {"text": continuation, "tokens": tokens, "logits_sha256": digest.hexdigest(), "prompt_tokens": len(ids),
                  "prompt_tokens_per_second": prompt_rate, "tokens_per_second": rate, "form": model.info.form,
                  "kernels": kernels}  # fmt: skip
        click.echo(json.dumps(result))
        return
    click.echo(continuation[shown:])
    note = f"prompt {len(ids)} tokens, {prompt_rate:.1f} tokens/s; generated {len(tokens)}, {rate:.1f} tokens/s"
    click.echo(note, err=True)


def main() -> None:
    """The command as a program: our errors are one line, never a traceback."""
    try:
        generate(standalone_mode=False, prog_name="python -m tmexport.onnx.generate")
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except TmexportError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
