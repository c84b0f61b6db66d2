"""Perplexity of a text in torch (fp32) and in every form of the ONNX file of the same checkpoint.

    python scripts/peers/onnx_perplexity.py ckpt/ heldout.jsonl --tokens 20000

The embedding stays in fp32 (--embedding-type f32), so that only the arithmetic differs; `ort q8` adds what an 8-bit
embedding costs. The last line on stdout is one JSON object: perplexity and ratio to torch for each.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from tokenizers import Tokenizer

from qat.model import load_model
from runtime_ref.ort import OrtModel
from tmexport.checkpoint import open_checkpoint
from tmexport.cli.app import run_command
from tmexport.onnx.export import export_onnx
from tmexport.onnx.graph import build_graph

VARIANTS = (("ort", "f32"), ("ort", "q8"), ("portable", "f32"), ("custom", "f32"))


def read_text(path: Path) -> str:
    """A text file, or the "text" fields of a JSON Lines file."""
    text = path.read_text(encoding="utf-8")
    return "\n".join(json.loads(line)["text"] for line in text.splitlines()) if path.suffix == ".jsonl" else text


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """fp64, one a position; logits [T, vocab], targets [T]."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    return np.log(np.exp(wide - top[:, None]).sum(axis=1)) + top - wide[np.arange(len(targets)), targets]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path, exists=True))
@click.argument("text", type=click.Path(path_type=Path, exists=True))
@click.option("--tokens", default=20000, show_default=True)
@click.option(
    "--length", default=512, show_default=True, help="Tokens a window; every window starts from the zero state."
)
def main(checkpoint: Path, text: Path, tokens: int, length: int) -> None:
    """Compare CHECKPOINT's perplexity of TEXT between torch and ONNX."""
    source = open_checkpoint(checkpoint)
    ids = np.array(Tokenizer.from_file(str(source.tokenizer)).encode(read_text(text)[: tokens * 8]).ids[: tokens + 1])
    windows = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    reference = load_model(checkpoint)

    def by_torch(window: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return reference(torch.from_numpy(window[None]))[0].numpy()

    def by_onnx(model: OrtModel, window: np.ndarray) -> np.ndarray:
        return model.run(model.new_state(), window[None])[0]

    runners: dict[str, Callable[[np.ndarray], np.ndarray]] = {"torch": by_torch}
    with tempfile.TemporaryDirectory() as folder:
        for form, embedding in VARIANTS:
            path = Path(folder) / f"{form}_{embedding}.onnx"
            export_onnx(path, build_graph(source, form, embedding), None)
            model = OrtModel.load(path)
            runners[f"{form} {embedding}"] = partial(by_onnx, model)
    losses = {name: np.concatenate([negative_log_likelihood(run(w[:-1]), w[1:]) for w in windows]) for name, run in runners.items()}  # fmt: skip
    perplexity = {name: float(np.exp(values.mean())) for name, values in losses.items()}
    ratios = {name: value / perplexity["torch"] - 1 for name, value in perplexity.items()}
    for name, value in perplexity.items():
        click.echo(f"{name:<14} perplexity {value:10.4f}   {100 * ratios[name]:+.4f} %")
    click.echo(json.dumps({"tokens": len(losses["torch"]), "perplexity": perplexity, "relative": ratios}))


if __name__ == "__main__":
    run_command(main, "scripts/peers/onnx_perplexity.py")
