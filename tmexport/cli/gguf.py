"""`tmexport gguf`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from tmexport.cli.options import (
    HELP,
    PATH,
    no_tokenizer_option,
    round_scales_option,
    tokenizer_option,
    warn_of_rounded_scales,
)
from tmexport.cli.progress import progress_bar
from tmexport.files import refuse_overwriting


@click.command(context_settings=HELP)
@click.argument("checkpoint", type=PATH)
@click.argument("output", type=PATH, required=False)
@click.option("--type", "kind", type=click.Choice(["auto", "tq1_0", "tq2_0", "q2_0", "q4_0", "q8_0", "q1_0", "f16"]), default="auto",
              show_default=True, help="Type of in_proj and out_proj; auto is the smallest that is exact. q4_0: larger, and quick in llama.cpp on every CPU.")  # fmt: skip
@click.option("--embedding-type", type=click.Choice(["auto", "f16", "q8_0", "q4_0"]), default="auto", show_default=True,
              help="Type of the embedding and of an untied head; auto is f16, or the smallest that holds its codes.")  # fmt: skip
@click.option("--ptq", type=click.Choice(["rtn"]), help="Round weights that are not ternary to nearest. Loses quality.")
@round_scales_option
@tokenizer_option
@no_tokenizer_option
@click.option("--dry-run", is_flag=True, help="Print what would be written, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a listing.")
def gguf(
    checkpoint: Path,
    output: Path | None,
    kind: str,
    embedding_type: str,
    ptq: str | None,
    round_scales: bool,
    tokenizer: Path | None,
    no_tokenizer: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT (state-spaces, Hugging Face or ternary folder) to OUTPUT, a GGUF that stock llama.cpp loads.

    \b
    Examples:
      tmexport gguf ckpt/ model.gguf
      tmexport gguf ckpt/ ids-only.gguf --no-tokenizer
      tmexport gguf mamba2-130m/ fp.gguf --type f16 --tokenizer neox/tokenizer.json
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.export import plan_export

    if output is None and not dry_run:
        raise click.UsageError("missing argument OUTPUT, the GGUF to write (only --dry-run goes without)")
    if ptq and round_scales:
        raise click.UsageError("--ptq rounds everything and --round-scales nothing but scales; choose one")
    if ptq and kind == "f16":
        raise click.UsageError("--ptq rounds to a ternary type; it cannot be combined with --type f16")
    if tokenizer and no_tokenizer:
        raise click.UsageError("--tokenizer and --no-tokenizer exclude each other")
    source = open_checkpoint(checkpoint, round_scales)
    plan = plan_export(source, kind, embedding_type, ptq == "rtn", tokenizer, no_tokenizer)
    if round_scales and kind != "f16":
        warn_of_rounded_scales(source)
    if ptq:
        click.echo("warning: --ptq rtn rounds weights that are not ternary; quality will be lost", err=True)
    for sentence in plan.warnings:
        click.echo(f"warning: {sentence}", err=True)
    if "tokenizer.ggml.tokens" not in plan.metadata and not no_tokenizer:
        click.echo(
            "warning: no tokenizer.json in the checkpoint; the file takes token ids only (see --tokenizer and --no-tokenizer)",
            err=True,
        )
    if not as_json:
        for tensor in plan.tensors:
            shape = "{" + ", ".join(map(str, tensor.shape[::-1])) + "}"
            click.echo(f"{tensor.name + ',':<28} shape = {shape:<16} {tensor.kind.name:<6} {tensor.n_bytes:>12,} bytes")
        for reason in plan.reasons if dry_run else ():
            click.echo(reason)
    size = plan.n_bytes
    if not dry_run:
        assert output is not None
        refuse_overwriting(output, checkpoint, tokenizer)
        with progress_bar("writing", len(plan.tensors), unit="tensors") as bar:
            size = plan.write(output, lambda tensor: bar.advance())
    ratio = plan.n_bytes_fp16 / size
    if as_json:
        tensors = [{"name": t.name, "shape": t.shape, "type": t.kind.name, "bytes": t.n_bytes} for t in plan.tensors]
        result = {"output": str(output) if output else None, "dry_run": dry_run, "type": plan.kind.name, "group_size": plan.group_size,
                  "bytes": size, "bytes_fp16": plan.n_bytes_fp16, "ratio_to_fp16": ratio, "ptq": ptq, "warnings": plan.warnings, "tensors": tensors}  # fmt: skip
        click.echo(json.dumps(result))
    else:
        shown = click.format_filename(output) if output else None
        what = f"{shown}: would be" if dry_run else f"{shown}:"
        compared = f", {plan.n_bytes_fp16 / 1e6:.1f} MB in fp16: {ratio:.2f} x smaller" if ratio > 1 else ""
        click.echo(f"{what} {size / 1e6:.1f} MB{compared}")
