"""The command line. `tmexport VERB` looks the verb up in one table and imports its module only then."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import click

from tmexport import __version__
from tmexport.cli.app import run_command
from tmexport.cli.options import HELP
from tmexport.extras import import_with


class Verb(NamedTuple):
    """group: its section in --help. target: module:object of the click command. extra: of pyproject.toml, what it needs."""

    group: str
    target: str
    help: str
    extra: str = ""


TRAIN, EXPORT, RUN = "Make a low-bit model", "Export it and prove it", "Run it and measure it"
VERBS = {
    "train": Verb(TRAIN, "qat.train.cli:main", "Train a ternary student from a teacher, or a teacher from nothing.", "qat"),
    "ptq": Verb(TRAIN, "qat.ptq.cli:main", "Make a low-bit checkpoint without training.", "qat"),
    "convert": Verb(TRAIN, "qat.convert.cli:main", "Make a Mamba-2 hybrid out of a Transformer.", "qat"),
    "synthesize": Verb(TRAIN, "qat.synthesis.cli:main", "Let a teacher write its own training text.", "qat"),
    "import": Verb(TRAIN, "tmexport.cli.importing:import_", "Write a checkpoint folder from a llama GGUF: a teacher."),
    "evaluate": Verb(TRAIN, "qat.evaluate:main", "Bits per byte and perplexity of a checkpoint folder.", "qat"),
    "gguf": Verb(EXPORT, "tmexport.cli.gguf:gguf", "Export a checkpoint to a GGUF that stock llama.cpp loads."),
    "onnx": Verb(EXPORT, "tmexport.cli.onnx:onnx", "Export a checkpoint to an ONNX file.", "onnx"),
    "web": Verb(EXPORT, "tmexport.cli.web:web", "Write a page that runs a model in a browser."),
    "verify": Verb(EXPORT, "tmexport.cli.verify:verify", "Prove that an exported file holds the checkpoint."),
    "inspect": Verb(EXPORT, "tmexport.cli.inspect:inspect", "Show dimensions, types, sizes and zero ratios of a model."),
    "card": Verb(EXPORT, "tmexport.cli.card:card", "Write the model card of a checkpoint folder, for the Hub."),
    "doctor": Verb(EXPORT, "tmexport.cli.doctor:doctor", "Say what a GGUF of any program is, and what is wrong with it."),
    "generate": Verb(RUN, "runtime_ref.generate:generate", "Continue a text with a GGUF or ONNX file."),
    "chat": Verb(RUN, "runtime_ref.chat:chat", "Talk with a GGUF in the terminal.", "serve"),
    "serve": Verb(RUN, "runtime_ref.serve.cli:serve", "Serve a GGUF over HTTP as OpenAI's API.", "serve"),
    "perplexity": Verb(RUN, "runtime_ref.perplexity:perplexity", "Bits per byte and perplexity of a GGUF on a text."),
    "bench": Verb(RUN, "runtime_ref.bench.cli:bench", "Time a GGUF: speed, latency, memory, bandwidth."),
    "zero-shot": Verb(RUN, "zero_shot.cli:zero_shot", "Accuracy of a model on zero-shot tasks."),
}  # fmt: skip


def load(name: str) -> click.Command:
    """The command object of a verb.

    Raises:
        UsageError: it needs a package that is not installed.
    """
    verb = VERBS[name]
    module, _, target = verb.target.partition(":")
    return getattr(import_with(verb.extra, module), target)


class Verbs(click.Group):
    """A group whose commands are those of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return load(name) if name in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for group in dict.fromkeys(verb.group for verb in VERBS.values()):
            with formatter.section(group):
                formatter.write_dl(
                    [(name, verb.help) for name, verb in VERBS.items() if verb.group == group], col_max=12
                )


@click.group(cls=Verbs, context_settings=HELP, invoke_without_command=True, no_args_is_help=False)
@click.version_option(__version__, prog_name="tmexport")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Low-bit state-space models for CPUs and edge boards: train, export without loss, prove, run.

    \b
    Examples:
      tmexport gguf ckpt/ model.gguf && tmexport verify ckpt/ model.gguf
      tmexport generate model.gguf --prompt "Fellow citizens"
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def run_verb(verb: str, name: str) -> NoReturn:
    """Run a verb as the program `name`: what `python -m package.verb` does before it imports anything else."""
    run_command(lambda: load(verb), name)


def main() -> NoReturn:
    """The console script."""
    run_command(cli, "tmexport")
