"""A GGUF as a scorer: `runtime_ref`, the runtime that will serve the file."""

from __future__ import annotations

from pathlib import Path

from runtime_ref.arithmetic import DEFAULT
from runtime_ref.command import compile_kernels
from runtime_ref.model import Model
from runtime_ref.perplexity import end_of_text, score_tokens
from runtime_ref.sampling import log_probabilities
from runtime_ref.tokenizer import Tokenizer
from tmexport.errors import UsageError
from zero_shot.scoring import Likelihood


class RuntimeScorer:
    """The context is read once; its state is copied for each continuation, which changes no bit of the logits."""

    def __init__(self, path: Path, profile: str = DEFAULT, threads: int | None = None) -> None:
        self._tokenizer = Tokenizer.from_gguf(path)
        self.model = Model.load(path, profile, threads)
        eos = end_of_text(self.model, self._tokenizer)
        if eos is None:
            raise UsageError(f"{path}: names no end-of-text token; export it again with a tokenizer that has one")
        self.end_of_text = eos
        compile_kernels(self.model)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def likelihoods(self, context: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        state = self.model.new_state()
        first = self.model.prefill(state, context)[None]
        results = []
        for tokens in continuations:
            parts = [first]
            if len(tokens) > 1:
                parts += self.model.score(state.copy(), tokens[:-1])
            nats, greedy, at = 0.0, True, 0
            for logits in parts:
                targets = tokens[at : at + len(logits)]
                nats += float(log_probabilities(logits, targets).sum())
                greedy &= bool((logits.argmax(axis=1) == targets).all())
                at += len(logits)
            results.append((nats, greedy))
        return results

    def rolling(self, tokens: list[int]) -> float:
        return -score_tokens(self.model, [self.end_of_text, *tokens])
