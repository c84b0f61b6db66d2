"""`tmexport verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmexport.cli.options import HELP, PATH, json_option, round_scales_option, tokenizer_option
from tmexport.cli.progress import progress_bar
from tmexport.errors import TmexportError
from tmexport.extras import import_with

if TYPE_CHECKING:
    from tmexport.checkpoint import Checkpoint


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=PATH)
@click.argument("exported", type=PATH)
@click.option("--texts", type=PATH, help="Also tokenise this file (text, or .jsonl) with llama.cpp; needs xllamacpp.")
@round_scales_option
@tokenizer_option
@json_option
def verify(
    checkpoint: Path, exported: Path, texts: Path | None, round_scales: bool, tokenizer: Path | None, as_json: bool
) -> None:
    """Prove that EXPORTED holds CHECKPOINT: codes and scales bit for bit, the rest within its type's rounding.

    Exits with 0, or with 1 and the first difference named.

    \b
    Example:
      tmexport verify ckpt/ model.gguf
      tmexport verify ckpt/ model.gguf --texts heldout.txt
      tmexport verify mamba2-130m/ fp.gguf --tokenizer neox/tokenizer.json
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.reader import open_gguf
    from tmexport.verify import verify_gguf

    if texts is not None and exported.suffix == ".onnx":
        raise click.UsageError("--texts asks llama.cpp, which reads a GGUF")
    source = open_checkpoint(checkpoint, round_scales)
    with progress_bar("comparing", len(source.names), unit="tensors") as bar:
        if exported.suffix == ".onnx":
            verify_onnx = import_with("onnx", "tmexport.onnx.verify").verify_onnx
            report = verify_onnx(source, exported, lambda name: bar.advance(), tokenizer)
        else:
            report = verify_gguf(source, open_gguf(exported), lambda name: bar.advance(), tokenizer)
    compared = (
        None
        if texts is None or report.difference
        else _compare_texts(tokenizer or source.tokenizer, source, exported, texts)
    )
    if as_json:
        difference = vars(report.difference) if report.difference else None
        click.echo(
            json.dumps(vars(report) | {"equal": difference is None, "difference": difference, "texts": compared})
        )
    elif report.difference is None:
        click.echo(
            f"{click.format_filename(exported)}: equal. {report.codes:,} codes and {report.scales:,} scales in {report.ternary_tensors} low-bit tensors "
            f"bit for bit; {report.other_tensors} other tensors within their type's rounding"
        )
        if compared is not None:
            click.echo(f"{texts}: {compared['tokens']:,} tokens in {compared['texts']} texts, the same in llama.cpp")
    if report.difference is not None:
        raise TmexportError(f"{exported}: {report.difference}")


def _compare_texts(file: Path | None, source: Checkpoint, exported: Path, path: Path) -> dict[str, int]:
    """How many texts and tokens were the same in both programs.

    Raises:
        TmexportError: the first difference; or there is no tokenizer, or no llama.cpp.
    """
    from tmexport.gguf.reader import open_gguf
    from tmexport.tokenizer.parse import parse_tokenizer, read_tokenizer
    from tmexport.tokenizer.texts import LlamaTokenizer, first_difference, read_texts

    if file is None:
        raise TmexportError(f"{source.path}: has no tokenizer.json to compare with; name one with --tokenizer")
    texts = read_texts(path)
    tokenizer = parse_tokenizer(read_tokenizer(file), str(file))
    count = 0

    def ours(text: str) -> list[int]:
        nonlocal count
        ids = tokenizer.encode(text).ids
        count += len(ids)
        return ids

    with LlamaTokenizer(open_gguf(exported).metadata) as llama:
        difference = first_difference(texts, ours, lambda text: llama.tokenize(text, add_special=True))
    if difference is not None:
        raise TmexportError(f"{path}: {difference}")
    return {"texts": len(texts), "tokens": count}
