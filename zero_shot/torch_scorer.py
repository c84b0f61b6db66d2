"""A checkpoint folder as a scorer: `qat.model` in PyTorch, fp32, on CUDA if there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qat.evaluate import end_of_text_id, find_tokenizer, score_document
from qat.model import load_model
from runtime_ref.sampling import log_probabilities
from runtime_ref.tokenizer import Tokenizer
from tmexport.checkpoint import open_checkpoint
from tmexport.threads import default_threads
from zero_shot.scoring import Likelihood


class TorchScorer:
    """The context is read once; its continuations follow as one batch, filled up on the right."""

    def __init__(self, folder: Path, tokenizer: Path | None = None, threads: int | None = None) -> None:
        torch.set_num_threads(threads or default_threads())
        config = open_checkpoint(folder).config
        path = find_tokenizer(folder, tokenizer)
        self._tokenizer = Tokenizer(path.read_text(encoding="utf-8-sig"), str(path))
        self.end_of_text = end_of_text_id(config, path)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(folder).to(self._device)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    @torch.no_grad()
    def likelihoods(self, context: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        states = self.model.fresh_states()
        hidden = self.model.backbone(self._ids([context]), states)[:, -1:].repeat(len(continuations), 1, 1)
        longest = max(len(tokens) for tokens in continuations)
        if longest > 1:
            for state in (state for block in states for state in block):  # one state a branch
                for name, value in vars(state).items():
                    assert value is not None
                    setattr(state, name, value.repeat(len(continuations), *[1] * (value.ndim - 1)))
            padded = [tokens[:-1] + [0] * (longest - len(tokens)) for tokens in continuations]
            hidden = torch.cat([hidden, self.model.backbone(self._ids(padded), states)], 1)
        results = []
        for row, tokens in zip(hidden, continuations, strict=True):
            logits = (row[: len(tokens)] @ self.model.head_weight.T).cpu().numpy()
            nats = float(log_probabilities(logits, tokens).sum())
            results.append((nats, bool((logits.argmax(axis=1) == tokens).all())))
        return results

    def rolling(self, tokens: list[int]) -> float:
        return -score_document(self.model, np.array([self.end_of_text, *tokens]))

    def _ids(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)
