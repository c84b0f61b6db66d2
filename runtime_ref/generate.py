"""Continue a text with a GGUF or an ONNX file.

    tmexport generate MODEL.gguf --prompt "Fellow citizens" -n 64 --temperature 0
    tmexport generate MODEL.onnx --prompt-file speech.txt
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.core import ParameterSource

from runtime_ref.command import DEMO_MODEL, compile_kernels, for_terminal, profile_option, sampling_options
from runtime_ref.loading import Loaded, load_gguf, load_onnx
from runtime_ref.memory import MemorySize, check_memory
from runtime_ref.prompt import read_prompt
from runtime_ref.sampling import Sampling
from tmexport.cli.options import HELP, PATH, threads_option
from tmexport.errors import UsageError
from tmexport.extras import import_with
from tmexport.files import refuse_overwriting

_GGUF_ONLY = ("profile", "load_state", "save_state", "max_memory", "chat", "chat_template")


@click.command(context_settings=HELP)
@click.argument("model_path", metavar="[MODEL]", default=DEMO_MODEL, type=PATH)
@click.option("-p", "--prompt", help="The text to continue; - reads it from stdin, as does a pipe without any prompt.")
@click.option("--prompt-file", type=PATH, help="A UTF-8 file that holds the text to continue.")
@click.option("--tokens", "token_ids", metavar="IDS", help="The prompt as token ids: 1,2,3. For a file without a tokenizer.")  # fmt: skip
@click.option("-n", "--count", type=click.IntRange(1), default=64, show_default=True, help="Tokens to make.")
@sampling_options(temperature=0.0)
@threads_option
@profile_option
@click.option("--kernels", is_flag=True, help="Compute an ONNX file of the custom form with the runtime's own bit-exact arithmetic.")  # fmt: skip
@click.option("--tokenizer", "tokenizer_path", type=PATH,
              help="A tokenizer.json. Default: the one in or beside the file, or else the file's own vocabulary.")  # fmt: skip
@click.option(
    "--chat", is_flag=True, help="The prompt is a user's message; the model answers it, through its chat template."
)
@click.option("--chat-template", type=PATH, help="A jinja file for --chat. Default: the template in the file.")
@click.option("--load-state", type=PATH, help="Continue from a saved state.")
@click.option("--save-state", type=PATH, help="Save the state when done.")
@click.option("--max-memory", type=MemorySize(), help="Refuse a model that needs more, before loading it: 512M, 1.5G.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.pass_context
def generate(
    ctx: click.Context,
    model_path: Path,
    prompt: str | None,
    prompt_file: Path | None,
    token_ids: str | None,
    count: int,
    sampling: Sampling,
    threads: int | None,
    profile: str,
    kernels: bool,
    tokenizer_path: Path | None,
    chat: bool,
    chat_template: Path | None,
    load_state: Path | None,
    save_state: Path | None,
    max_memory: int | None,
    as_json: bool,
) -> None:
    """Continue a text with MODEL, a .gguf or .onnx file; it ends after -n tokens, or with an end-of-text token.

    Without MODEL: with the demo model that comes with the package, trained on State of the Union speeches.

    \b
    Examples:
      tmexport generate --prompt "My fellow citizens" --temperature 0.8 --top-p 0.95
      tmexport generate model.gguf --prompt-file speech.txt -n 64
      echo "Fellow citizens" | tmexport generate model.onnx --json
    """
    is_onnx = model_path.suffix == ".onnx"
    if is_onnx:
        _refuse_gguf_options(ctx)
    elif kernels:
        raise UsageError("--kernels is for an ONNX file; a GGUF always runs with the runtime's own kernels")
    if chat_template is not None and not chat:
        raise UsageError("--chat-template is for --chat")
    if save_state is not None:
        refuse_overwriting(save_state, model_path, prompt_file, tokenizer_path, chat_template)
    text = read_prompt(prompt, prompt_file, token_ids)
    if max_memory is not None:
        check_memory(model_path, max_memory, profile, states=5 if load_state or save_state else 2)
    need_text = isinstance(text, str)
    if is_onnx:
        loaded = load_onnx(model_path, kernels, threads, tokenizer_path, need_text)
    else:
        loaded = load_gguf(model_path, profile, threads, tokenizer_path, need_text)
    if chat:
        ids, text = _message_ids(loaded, model_path, chat_template, text), ""
    else:
        ids = loaded.encode(text)
    model: Any = loaded.model
    state = model.load_state(load_state) if load_state else model.new_state()
    if not is_onnx:
        compile_kernels(model, len(ids))
    run = _Run(len(ids))
    if as_json:
        run.tokens += model.generate(ids, count, sampling, state, loaded.stop, run.seen)
    else:
        _show(run, loaded, text, model.generate(ids, count, sampling, state, loaded.stop, run.seen))
    run.end = time.perf_counter()
    if save_state:
        model.decode(state, run.tokens[-1])  # the state then covers all of the text shown
        state.save(save_state)
    if as_json:
        continuation = loaded.tokenizer.decode(run.tokens) if loaded.tokenizer else None
        click.echo(json.dumps({"text": continuation} | run.as_dict() | loaded.about))
    else:
        click.echo(run.summary(), err=True)


@dataclass
class _Run:
    """What happened: tokens, a digest of all logits, and when."""

    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)
    start: float = field(default_factory=time.perf_counter)
    first: float = 0.0  # when the first logits were there
    end: float = 0.0

    def seen(self, logits: np.ndarray) -> None:
        self.digest.update(logits.tobytes())
        self.first = self.first or time.perf_counter()

    @property
    def prompt_rate(self) -> float:
        return self.prompt_tokens / (self.first - self.start)

    @property
    def rate(self) -> float:
        return (len(self.tokens) - 1) / (self.end - self.first) if len(self.tokens) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens, "logits_sha256": self.digest.hexdigest(), "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_per_second": self.prompt_rate, "tokens_per_second": self.rate,
        }  # fmt: skip

    def summary(self) -> str:
        return (
            f"prompt {self.prompt_tokens} tokens, {self.prompt_rate:.1f} tokens/s; "
            f"generated {len(self.tokens)}, {self.rate:.1f} tokens/s"
        )


def _show(run: _Run, loaded: Loaded, prompt: str | list[int], tokens: Any) -> None:
    """Print the prompt and its continuation as it is made: text, or ids where there is no tokenizer."""
    shown = for_terminal if sys.stdout.isatty() else str
    stream = loaded.tokenizer.stream() if loaded.tokenizer else None
    if isinstance(prompt, list):
        prompt = loaded.tokenizer.decode(prompt) if loaded.tokenizer else " ".join(map(str, prompt))
    click.echo(shown(prompt), nl=False)
    for token in tokens:
        run.tokens.append(token)
        click.echo(shown(stream.push(token)) if stream else f" {token}", nl=False)
    click.echo(shown(stream.flush()) if stream else "")


def _message_ids(loaded: Loaded, model_path: Path, template: Path | None, message: str | list[int]) -> list[int]:
    """The token ids of a conversation of one message, up to the answer."""
    if not isinstance(message, str) or loaded.tokenizer is None:
        raise UsageError("--chat takes a text; --tokens has none")
    found = import_with("serve", "tmexport.chat_template").needed_template(model_path, template)
    return loaded.tokenizer.encode(found.render([{"role": "user", "content": message}]))


def _refuse_gguf_options(ctx: click.Context) -> None:
    for name in _GGUF_ONLY:
        if ctx.get_parameter_source(name) not in (ParameterSource.DEFAULT, None):
            raise UsageError(f"--{name.replace('_', '-')} is for a GGUF; an ONNX file has its own arithmetic and no saved states")  # fmt: skip
