"""generate and perplexity as commands: outputs, agreement with the library, errors of one line."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from runtime_ref.generate import generate
from runtime_ref.model import Model
from runtime_ref.perplexity import perplexity, score_tokens
from runtime_ref.tokenizer import Tokenizer
from tests.commands import invoke
from tests.models import ternary_tensors
from tests.runtime_ref.small import sha
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.documents import read_documents
from tmexport.errors import TokenizerError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.model import mamba2_model

TEXT = "Fellow citizens — naïve ☃ and 𝄞, the state of the Union is strong.\n" * 3


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """A small model with a byte-level BPE that has <|endoftext|> as token 0."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=288, d_state=64)
    tensors = ternary_tensors(config)
    tensors["backbone.embeddings.weight"] *= 0.1
    write_checkpoint(folder / "ckpt", config, tensors, folder / "tokenizer.json")
    plan_export(open_checkpoint(folder / "ckpt"), "tq2_0", "q8_0").write(folder / "model.gguf", lambda t: None)
    return folder / "model.gguf"


def run(command, *args):
    return invoke(command, *args)


@pytest.fixture(scope="module")
def printed(gguf):
    result = run(generate, gguf, "--prompt", "Fellow", "-n", 12, "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_generate_json_agrees_with_the_library(gguf, printed):
    model, tokenizer = Model.load(gguf, "exact", 1), Tokenizer.from_gguf(gguf)
    state, logits, tokens = model.new_state(), [], []
    logits.append(model.prefill(state, tokenizer.encode("Fellow")))
    for position in range(12):
        tokens.append(int(np.argmax(logits[-1])))
        if position < 11:
            logits.append(model.decode(state, tokens[-1]))
    assert printed["tokens"] == tokens
    assert printed["logits_sha256"] == sha(np.stack(logits))
    assert printed["text"] == tokenizer.decode(tokens)
    assert printed["prompt_tokens_per_second"] > 0
    assert printed["tokens_per_second"] > 0


def test_generate_streams_the_same_text(gguf, printed):
    result = run(generate, gguf, "--prompt", "Fellow", "-n", 12, "--threads", 1)
    assert result.exit_code == 0
    assert result.stdout == "Fellow" + printed["text"] + "\n"
    assert "tokens/s" in result.stderr


def test_a_saved_state_continues_the_text(gguf, tmp_path):
    common = ["-n", 4, "--json", "--threads", 1]
    first = run(generate, gguf, "--prompt", "Fellow", *common, "--save-state", tmp_path / "s")
    assert first.exit_code == 0, first.output
    second = run(generate, gguf, "--prompt", " and", *common, "--load-state", tmp_path / "s")
    assert second.exit_code == 0, second.output
    shown, continued = (json.loads(r.stdout.splitlines()[-1])["tokens"] for r in (first, second))
    tokenizer = Tokenizer.from_gguf(gguf)
    whole = [*tokenizer.encode("Fellow"), *shown, *tokenizer.encode(" and")]
    assert list(Model.load(gguf, "exact", 1).generate(whole, 4)) == continued


def test_seeds_repeat_and_differ(gguf):
    def sample(seed):
        result = run(
            generate, gguf, "--prompt", "a", "-n", 8, "--temperature", 2, "--seed", seed, "--json", "--threads", 1
        )
        return json.loads(result.stdout.splitlines()[-1])["tokens"]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_text_is_streamed_in_whole_characters(gguf):
    tokenizer = Tokenizer.from_gguf(gguf)
    text = "naïve ☃ 𝄞 end"
    ids = [i for character in text for byte in character.encode() for i in _byte_token(tokenizer, byte)]
    assert len(ids) == len(text.encode())
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == text
    assert not any("\ufffd" in part for part in parts)
    assert tokenizer.stream().push(ids[2]) == ""  # the first byte of ï
    broken = tokenizer.stream()
    assert broken.push(ids[2]) + broken.flush() == "\ufffd"


def _byte_token(tokenizer, byte):
    """The token of a single byte in GPT-2's byte alphabet."""
    table = [b for b in range(256) if chr(b).isprintable() and b not in (32, 173)]
    extra = [b for b in range(256) if b not in table]
    character = chr(byte) if byte in table else chr(256 + extra.index(byte))
    return [tokenizer.token_id(character)]


def test_perplexity_equals_a_sum_over_single_steps(gguf, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    result = run(perplexity, gguf, tmp_path / "text.txt", "--json", "--threads", 1)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    model, tokenizer = Model.load(gguf, "exact", 1), Tokenizer.from_gguf(gguf)
    ids, state, nats = [0, *tokenizer.encode(TEXT)], model.new_state(), 0.0
    for given, target in itertools.pairwise(ids):
        logits = model.decode(state, given).astype(np.float64)
        nats -= logits[target] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    assert printed["tokens"] == len(ids) - 1
    assert printed["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-9)
    assert printed["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-9)
    assert score_tokens(model, ids) == pytest.approx(nats, rel=1e-9)


def test_every_line_of_a_jsonl_file_is_a_document(tmp_path):
    (tmp_path / "two.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\u2028"}\n', encoding="utf-8")
    assert list(read_documents(tmp_path / "two.jsonl")) == ["one", "two\u2028"]
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"texts": 1}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 2 has no string"):
        list(read_documents(tmp_path / "bad.jsonl"))


def test_a_file_without_a_tokenizer_is_refused(gguf, tmp_path):
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=32, d_state=64)
    write_checkpoint(tmp_path / "ckpt", config, ternary_tensors(config), None)
    plan_export(open_checkpoint(tmp_path / "ckpt"), "tq2_0", "q8_0").write(tmp_path / "m.gguf", lambda t: None)
    with pytest.raises(TokenizerError, match="has no tokenizer.huggingface.json and no vocabulary"):
        Tokenizer.from_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["runtime_ref.generate", "none.gguf", "--prompt", "a"], 1, "none.gguf: cannot be read"),
        (["runtime_ref.generate", "none.gguf", "--prompt", "a", "--temperature", "-1"], 2, "temperature is -1"),
        (["runtime_ref.perplexity", "none.gguf", "none.txt"], 2, "none.txt: cannot be read"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(args, code, message, tmp_path):
    done = subprocess.run([sys.executable, "-m", *args], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_importing_runtime_ref_is_light():
    code = "import sys, runtime_ref; print([m for m in ('numba', 'torch', 'onnx', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
