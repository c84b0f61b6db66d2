"""Options and arguments that several commands have, so that each is spelled and explained once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tmexport.checkpoint import Checkpoint

PATH = click.Path(path_type=Path)
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


class Choice(click.Choice):
    """A choice that also takes `old` spellings, silently."""

    def __init__(self, choices: list[str], old: Mapping[str, str]) -> None:
        super().__init__(choices)
        self._old = dict(old)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(self._old.get(value, value), param, ctx)


threads_option = click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, 1024),
    help="Threads of the CPU. Default: the cores this process may use, or the CPUs its container is allowed.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
tokenizer_option = click.option(
    "--tokenizer", type=PATH, help="A tokenizer.json to take in place of the checkpoint's, which may have none."
)
no_tokenizer_option = click.option(
    "--no-tokenizer", is_flag=True, help="Leave the tokenizer out; the file takes token ids only."
)
round_scales_option = click.option(
    "--round-scales",
    is_flag=True,
    help="Take weights that are ternary but for scales that are no fp16 numbers (one fp32 scale, as BitNet's), and round these.",
)


def warn_of_rounded_scales(checkpoint: Checkpoint) -> None:
    """Say how much --round-scales changed."""
    error = max(map(checkpoint.scale_error, checkpoint.config.projections))
    click.echo(f"warning: --round-scales: the largest relative error of a scale in fp16 is {error:.1e}", err=True)


EMBEDDINGS = {"q8_0": "q8", "f16": "f16", "f32": "f32"}  # the command's word -> the one in the files' metadata
onnx_embedding_option = click.option(
    "--embedding-type",
    type=Choice(list(EMBEDDINGS), old={"q8": "q8_0"}),
    default="q8_0",
    show_default=True,
    help="Type of the embedding and of an untied head.",
)
