"""Files to test, the peer's logits, and feeding a session by hand."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
from click.testing import Result

from tests.commands import invoke
from tests.models import mixer, ternary_tensors, train_tokenizer
from tmexport.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, open_checkpoint, write_checkpoint
from tmexport.cli import cli
from tmexport.model import Model, mamba2_model
from tmexport.onnx.export import export_onnx
from tmexport.onnx.graph import build_graph
from tmexport.tokenizer.gguf import export_tokenizer

TIED = mamba2_model(d_model=256, n_layer=2, vocab_size=384, d_state=32, headdim=32)
UNTIED = mamba2_model(d_model=256, n_layer=2, vocab_size=320, d_state=64, tie_embeddings=False)
GROUPS = mamba2_model(d_model=256, n_layer=2, vocab_size=320, d_state=32, headdim=64, n_groups=2)
FORMS = ("ort", "portable", "custom")
EMBEDDINGS = ("q8", "f16", "f32")


def run(*args: object, command: click.Command = cli) -> Result:
    """The command with these arguments."""
    return invoke(command, *args)


def write_ternary(folder: Path, config: Model, group_size: int = 64, seed: int = 0) -> Checkpoint:
    """A random ternary checkpoint with a tokenizer, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(folder / "tokenizer.json", 300) if config.vocab_size >= 300 else None
    write_checkpoint(folder, config, ternary_tensors(config, group_size, seed), tokenizer)
    return open_checkpoint(folder)


def export(checkpoint: Checkpoint, path: Path, *args: object, **options: object) -> Path:
    """`path`, written by the exporter; arguments as for build_graph."""
    source = checkpoint.tokenizer
    text = None if source is None else export_tokenizer(source, checkpoint.config, checkpoint.path).text
    export_onnx(path, build_graph(checkpoint, *args, **options), text)
    return path


def zero_state(config: Model, batch: int) -> dict[str, np.ndarray]:
    """The inputs past_* before the first token, written out from docs/onnx.md."""
    state = {}
    for i in range(config.n_layer):
        state[f"past_conv.{i}"] = np.zeros((batch, mixer(config).conv_dim, mixer(config).d_conv - 1), np.float32)
        state[f"past_ssm.{i}"] = np.zeros(
            (batch, mixer(config).n_heads, mixer(config).d_state, mixer(config).headdim), np.float32
        )
    return state


def feed(runner: object, config: Model, ids: np.ndarray) -> np.ndarray:
    """Logits of ids [batch, time] from the zero state; `runner` is an InferenceSession or a ReferenceEvaluator."""
    return runner.run(["logits"], {"input_ids": ids, **zero_state(config, len(ids))})[0]


def peer_model(checkpoint: Checkpoint, dequantize_embedding: bool = False) -> object:
    """transformers' Mamba2ForCausalLM with these weights; the embedding through gguf's own Q8_0 if asked."""
    import gguf
    import torch
    from transformers import Mamba2Config as PeerConfig
    from transformers import Mamba2ForCausalLM

    raw = checkpoint.config.to_hf()
    model = Mamba2ForCausalLM(PeerConfig(**{k: v for k, v in raw.items() if k not in ("architectures", "model_type")}))
    state = {}
    for name in checkpoint.names:
        values = np.array(checkpoint.dense(name))
        if dequantize_embedding and name in (EMBEDDING, LM_HEAD):
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        state[name] = torch.from_numpy(values)
    state.setdefault(LM_HEAD, state[EMBEDDING])
    model.load_state_dict(state)
    return model.eval()


def peer_logits(checkpoint: Checkpoint, ids: np.ndarray, dequantize_embedding: bool = False) -> np.ndarray:
    import torch

    with torch.no_grad():
        return peer_model(checkpoint, dequantize_embedding)(torch.from_numpy(ids), use_cache=False).logits.numpy()


def share_of_spread(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the distance between the smallest and the largest logit."""
    return float(np.abs(found - wanted).max() / (wanted.max() - wanted.min()))


def token_ids(config: Model, *shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)
