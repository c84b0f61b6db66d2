"""Our models inside EleutherAI's lm-eval, for any of its tasks that score likelihoods.

In Python, `lm_eval.simple_evaluate(model=TmexportLM("model.gguf"), tasks=[...])`; on the command line, everything after
the module's name goes to lm-eval:

    python -m zero_shot.lm_eval_model run --model tmexport --model_args path=model.gguf --tasks arc_easy

Importing this module registers the model "tmexport". It needs lm-eval (pip install 'tmexport[eval]').
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from runtime_ref.arithmetic import DEFAULT
from tmexport.errors import UsageError
from zero_shot.cli import open_scorer
from zero_shot.scoring import Likelihood, score


@register_model("tmexport")
class TmexportLM(TemplateLM):
    """A .gguf in runtime_ref or a checkpoint folder in PyTorch; lm-eval divides contexts and continuations itself."""

    def __init__(
        self, path: str, profile: str = DEFAULT, threads: int | None = None, tokenizer: str | None = None, **_: Any
    ) -> None:
        super().__init__()
        self._scorer = open_scorer(Path(path), profile, threads, Path(tokenizer) if tokenizer else None)

    @property
    def eot_token_id(self) -> int:
        return self._scorer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._scorer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Likelihood]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm) as bar:
            return score(self._scorer, pairs, bar.update)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [self._scorer.rolling(self._scorer.encode(request.args[0])) for request in requests]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise UsageError("this model scores likelihoods only; choose tasks of lm-eval that do not generate")


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
