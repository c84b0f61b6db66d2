"""The model that comes with the package: what the commands run when no model is named."""

import json

from click.testing import CliRunner

from runtime_ref.command import DEMO_MODEL
from runtime_ref.generate import generate
from runtime_ref.tokenizer import Tokenizer
from tests.llama import Llama

PROMPT = "My fellow citizens"


def test_it_is_small_and_what_it_says_is_what_llama_cpp_says():
    assert DEMO_MODEL.stat().st_size <= 4_000_000
    asked = ["--prompt", PROMPT, "-n", "24", "--profile", "fast", "--json"]  # fast rounds activations as llama.cpp does
    answer = CliRunner().invoke(generate, asked, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    llama = Llama(DEMO_MODEL)
    tokens = llama.tokenize(PROMPT)
    assert tokens == Tokenizer.from_gguf(DEMO_MODEL).encode(PROMPT)
    assert json.loads(answer.stdout)["tokens"] == [token for token, _ in llama.greedy(tokens, 24)]
