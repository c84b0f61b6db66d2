"""A stock llama.cpp, in process: the peer that the exported files must satisfy."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import xllamacpp


class Llama:
    """A loaded GGUF, asked for one token at a time.

    The server leaves the probabilities out when the *sampled* token ends inside a UTF-8 character. So the sampler is
    biased to a letter, while the probabilities it reports are those of the model, before sampling.
    """

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel = 512, 1
        params.warmup, params.verbosity = False, -1
        params.cpuparams.n_threads = 2
        params.cpuparams_batch.n_threads = 2
        self._server = xllamacpp.Server(params)
        with urllib.request.urlopen(self._server.listening_address + "/slots", timeout=120) as answer:
            answer.read()  # from its queue: a server that ends before its queue runs waits for it for ever
        self._letter = self.tokenize("a")[0]

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        return self._post("/tokenize", {"content": text, "add_special": False, "parse_special": False})["tokens"]

    def next_token(self, tokens: list[int]) -> tuple[int, float]:
        """The most likely next token and its log probability."""
        body = {"prompt": tokens, "n_predict": 1, "n_probs": 2, "temperature": 0.0, "logit_bias": [[self._letter, 1e4]]}
        best = self._post("/completion", body)["completion_probabilities"][0]["top_logprobs"][0]
        return best["id"], best["logprob"]

    def greedy(self, tokens: list[int], count: int) -> list[tuple[int, float]]:
        """`count` tokens, each the most likely, with their log probabilities."""
        out: list[tuple[int, float]] = []
        for _ in range(count):
            out.append(self.next_token(tokens + [token for token, _ in out]))
        return out
