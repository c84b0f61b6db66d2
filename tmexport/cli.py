"""The command line: `tmexport gguf`, `onnx`, `web`, `verify`, `inspect`. Thin; the work is in the modules it calls."""

from __future__ import annotations

import errno
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tmexport import __version__
from tmexport.errors import TmexportError, UsageError
from tmexport.files import silence_stdout

if TYPE_CHECKING:
    from rich.progress import Progress

CHECKPOINT = click.Path(path_type=Path)


class _Group(click.Group):
    """Turns our errors into one line and an exit code, wherever they arise, so a traceback means a bug of ours."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except TmexportError as error:
            click.echo(f"tmexport: {error}", err=True)
            ctx.exit(error.exit_code)
        except MemoryError:
            click.echo("tmexport: out of memory; nothing was left half written", err=True)
            ctx.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # click's business: the reader has enough
                raise
            silence_stdout()
            click.echo(f"tmexport: the output cannot be written: {error.strerror or error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("tmexport: interrupted; nothing was left half written", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tmexport")
def cli() -> None:
    """Lossless export of ternary Mamba-2 checkpoints.

    \b
    Example:
      tmexport gguf ckpt/ model.gguf && tmexport verify ckpt/ model.gguf
    """


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _terminate)
    cli()


def _terminate(*_: object) -> None:
    """SIGTERM unwinds like Ctrl-C, so that the temporary file is removed; the shell's exit code for it is 143."""
    sys.exit(143)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@cli.command()
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option("--type", "kind", type=click.Choice(["auto", "tq1_0", "tq2_0", "q2_0", "f16"]), default="auto", show_default=True,
              help="Type of in_proj and out_proj; auto is the smallest that is exact.")  # fmt: skip
@click.option("--embedding-type", type=click.Choice(["f16", "q8_0", "q4_0"]), default="f16", show_default=True,
              help="Type of the embedding and of an untied head.")  # fmt: skip
@click.option("--ptq", type=click.Choice(["rtn"]), help="Round weights that are not ternary to nearest. Loses quality.")
@click.option("--tokenizer", type=CHECKPOINT, help="A tokenizer.json, if the checkpoint has none of its own.")
@click.option("--dry-run", is_flag=True, help="Print what would be written, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a listing.")
def gguf(
    checkpoint: Path,
    output: Path | None,
    kind: str,
    embedding_type: str,
    ptq: str | None,
    tokenizer: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT (state-spaces, Hugging Face or ternary folder) to OUTPUT, a GGUF that stock llama.cpp loads.

    \b
    Examples:
      tmexport gguf ckpt/ model.gguf
      tmexport gguf mamba2-130m/ fp.gguf --type f16 --tokenizer neox/tokenizer.json
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.export import plan_export

    if output is None and not dry_run:
        raise click.UsageError("missing argument OUTPUT, the GGUF to write (only --dry-run goes without)")
    if ptq and kind == "f16":
        raise click.UsageError("--ptq rounds to a ternary type; it cannot be combined with --type f16")
    source = open_checkpoint(checkpoint)
    plan = plan_export(source, kind, embedding_type, ptq == "rtn", tokenizer)
    if ptq:
        click.echo("warning: --ptq rtn rounds weights that are not ternary; quality will be lost", err=True)
    if "tokenizer.ggml.tokens" not in plan.metadata:
        click.echo(
            "warning: no tokenizer.json in the checkpoint; the file takes token ids only (see --tokenizer)", err=True
        )
    if not as_json:
        for tensor in plan.tensors:
            shape = "{" + ", ".join(map(str, tensor.shape[::-1])) + "}"
            click.echo(f"{tensor.name + ',':<28} shape = {shape:<16} {tensor.kind.name:<6} {tensor.n_bytes:>12,} bytes")
    size = plan.n_bytes
    if not dry_run:
        assert output is not None
        if output.exists() and any(output.samefile(file) for file in checkpoint.iterdir() if file.is_file()):
            raise UsageError(f"{output}: is a file of the checkpoint itself; name another file to write")
        with _progress() as progress:
            task = progress.add_task("writing", total=len(plan.tensors))
            size = plan.write(output, lambda tensor: progress.advance(task))
    ratio = plan.n_bytes_fp16 / size
    if as_json:
        tensors = [{"name": t.name, "shape": t.shape, "type": t.kind.name, "bytes": t.n_bytes} for t in plan.tensors]
        result = {"output": str(output) if output else None, "dry_run": dry_run, "type": plan.kind.name, "group_size": plan.group_size,
                  "bytes": size, "bytes_fp16": plan.n_bytes_fp16, "ratio_to_fp16": ratio, "ptq": ptq, "tensors": tensors}  # fmt: skip
        click.echo(json.dumps(result))
    else:
        shown = click.format_filename(output) if output else None
        what = f"{shown}: would be" if dry_run else f"{shown}:"
        click.echo(f"{what} {size / 1e6:.1f} MB, {plan.n_bytes_fp16 / 1e6:.1f} MB in fp16: {ratio:.2f} x smaller")


@cli.command()
@click.argument("checkpoint", type=CHECKPOINT)
@click.argument("exported", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(checkpoint: Path, exported: Path, as_json: bool) -> None:
    """Prove that EXPORTED holds CHECKPOINT: codes and scales bit for bit, the rest within its type's rounding.

    Exits with 0, or with 1 and the first difference named.

    \b
    Example:
      tmexport verify ckpt/ model.gguf
    """
    from tmexport.checkpoint import open_checkpoint
    from tmexport.gguf.reader import open_gguf
    from tmexport.verify import verify_gguf

    source = open_checkpoint(checkpoint)
    with _progress() as progress:
        task = progress.add_task("comparing", total=len(source.names))
        if exported.suffix == ".onnx":
            from tmexport.onnx.cli import verify_file

            report = verify_file(source, exported, lambda name: progress.advance(task))
        else:
            report = verify_gguf(source, open_gguf(exported), lambda name: progress.advance(task))
    if as_json:
        difference = vars(report.difference) if report.difference else None
        click.echo(json.dumps(vars(report) | {"equal": difference is None, "difference": difference}))
    elif report.difference is None:
        click.echo(
            f"{click.format_filename(exported)}: equal. {report.codes:,} codes and {report.scales:,} scales in {report.ternary_tensors} ternary tensors "
            f"bit for bit; {report.other_tensors} other tensors within their type's rounding"
        )
    if report.difference is not None:
        raise TmexportError(f"{exported}: {report.difference}")


@cli.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect(path: Path, as_json: bool) -> None:
    """Show what PATH (a GGUF file, an .onnx file or a checkpoint folder) holds: dimensions, types, sizes, zero ratios.

    \b
    Example:
      tmexport inspect model.gguf
    """
    from tmexport.inspect import inspect_path

    with _progress() as progress:
        task = progress.add_task("reading")
        summary = inspect_path(path, lambda name, total: progress.update(task, total=total, advance=1))
    if as_json:
        click.echo(json.dumps(summary.as_dict()))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    config, totals = summary.config, summary.as_dict()
    console = Console()
    console.print(
        f"[bold]{escape(click.format_filename(path))}[/]: {summary.format}, {summary.parameters:,} parameters, {summary.bytes / 1e6:.2f} MB",
        soft_wrap=True,
    )
    console.print(
        f"layers {config.n_layer}, d_model {config.d_model}, d_inner {config.d_inner}, d_state {config.d_state}, "
        f"heads {config.n_heads} of {config.headdim}, groups of B and C {config.n_groups}, vocabulary {config.vocab_size}, "
        f"head {'tied' if config.tie_embeddings else 'untied'}",
        soft_wrap=True,
    )
    if summary.onnx is not None:
        versions = ", ".join(f"{domain} {version}" for domain, version in summary.onnx["opset"].items())
        functions = ", ".join(summary.onnx["functions"]) or "none"
        console.print(
            f"form {summary.onnx['form']}, embedding {summary.onnx['embedding_type']}, logits {summary.onnx['logits']}, operators of {versions}, "
            f"IR version {summary.onnx['ir_version']}, {summary.onnx['nodes']} nodes, functions: {functions}",
            soft_wrap=True,
        )
    if totals["zero_ratio"] is not None:
        console.print(
            f"ternary: group size {summary.group_size or 'none (not every projection)'}, zero ratio {totals['zero_ratio']:.4f}"
        )
    table = Table("tensor", "shape", "type", "bytes", "zero ratio", box=None, header_style="bold")
    for column in (3, 4):
        table.columns[column].justify = "right"
    for tensor in summary.tensors:
        ratio = "" if tensor.zero_ratio is None else f"{tensor.zero_ratio:.4f}"
        table.add_row(tensor.name, " x ".join(map(str, tensor.shape)), tensor.type, f"{tensor.bytes:,}", ratio)
    console.print(table)


# At the end, because these modules use this one; they import onnx only when a command runs.
from tmexport.onnx.cli import onnx, web  # noqa: E402

cli.add_command(onnx)
cli.add_command(web)
