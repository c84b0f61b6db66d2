"""One definition of a score, two programs: what is read, what counts, and that Ctrl-C is heard meanwhile."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from qat.evaluate import main as evaluate
from runtime_ref.perplexity import perplexity
from runtime_ref.tokenizer import Tokenizer
from tests.commands import invoke
from tests.demo.running import ROOT
from tests.models import ternary_tensors, train_tokenizer
from tmexport.background import in_background
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.documents import Score, encode_documents, read_documents, score_documents, start_token
from tmexport.errors import TextError, TmexportError
from tmexport.gguf.export import plan_export
from tmexport.model import mamba2_model
from tmexport.tokenizer.texts import read_texts

BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small ternary model in both forms: the checkpoint folder and its GGUF; its config and tokenizer have a BOM."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(folder / "tokenizer.json", 300)
    config = mamba2_model(d_model=256, n_layer=1, vocab_size=320, d_state=64)
    tensors = ternary_tensors(config)
    tensors["backbone.embeddings.weight"] *= 0.1
    write_checkpoint(folder / "ckpt", config, tensors, tokenizer)
    plan_export(open_checkpoint(folder / "ckpt"), "tq2_0", "f16").write(folder / "m.gguf", lambda t: None)
    return folder


def scores(model, path):
    in_torch = invoke(evaluate, model / "ckpt", "--data", path, "--json", "--threads", 1)
    in_runtime = invoke(perplexity, model / "m.gguf", path, "--json", "--threads", 1)
    assert (in_torch.exit_code, in_runtime.exit_code) == (0, 0), in_torch.stderr + in_runtime.stderr
    found = json.loads(in_torch.stdout), json.loads(in_runtime.stdout)
    for printed in found:
        assert str(printed.pop("command")).startswith("tmexport ")
        assert printed.pop("text_sha256") == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    return found


DOCUMENTS = {
    "a marker inside": ["one two <|endoftext|> three", "four"],
    "only a marker": ["<|endoftext|>"],
    "a marker first and last": ["<|endoftext|>one<|endoftext|>"],
    "empty ones between": ["", "one", "", "two"],
    "other scripts": ["naïve ☃ Ω река", "\u2028 b"],
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_both_programs_count_the_same(model, tmp_path, case):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS[case]), encoding="utf-8")
    in_torch, in_runtime = scores(model, path)
    tokenizer = Tokenizer.from_gguf(model / "m.gguf")
    wanted = sum(len(tokenizer.encode(text)) for text in DOCUMENTS[case])
    assert in_torch["tokens"] == in_runtime["tokens"] == wanted
    assert in_torch["text_bytes"] == in_runtime["text_bytes"] == sum(len(t.encode()) for t in DOCUMENTS[case])
    assert in_runtime["bits_per_byte"] == pytest.approx(in_torch["bits_per_byte"], rel=1e-3)
    assert in_runtime["perplexity"] == pytest.approx(in_torch["perplexity"], rel=1e-3)
    assert set(in_torch) | {"profile"} == set(in_runtime)


def test_a_name_in_capitals_is_the_same_file(model, tmp_path):
    """As another system writes it: not one text with JSON's own signs in it."""
    lines = b'{"text": "one"}\r\n{"text": "two"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "A.JSONL").write_bytes(lines)
    assert list(read_documents(tmp_path / "A.JSONL")) == read_texts(tmp_path / "A.JSONL") == ["one", "two"]
    assert scores(model, tmp_path / "A.JSONL") == scores(model, tmp_path / "a.jsonl")


def test_a_marker_is_scored_given_what_precedes_it(model):
    """By hand: the marker's own nats are part of the sum, and what follows still sees what was before it."""
    tokenizer = Tokenizer.from_gguf(model / "m.gguf")
    eos = tokenizer.token_id("<|endoftext|>")
    (document,) = encode_documents(["a<|endoftext|>b"], tokenizer.encode_all, eos)
    assert document.ids.tolist() == [eos, *tokenizer.encode("a"), eos, *tokenizer.encode("b")]
    assert document.n_bytes == 15
    seen = []
    score = score_documents([document], lambda ids: seen.append(ids.tolist()) or 3.0)
    assert seen == [document.ids.tolist()]
    assert score == Score(3, 3.0, 15)


def test_without_a_start_token_the_first_is_not_scored():
    documents = list(encode_documents(["ab", "c"], lambda texts: [[ord(c) for c in t] for t in texts], None))
    assert [d.scored for d in documents] == [1, 0]
    assert score_documents(documents, lambda ids: 1.0) == Score(1, 1.0, 2)
    with pytest.raises(TextError, match="holds no token to score"):
        score_documents([documents[1]], lambda ids: 1.0)
    assert (start_token(5, lambda t: 7), start_token(None, lambda t: 7), start_token(None, lambda t: None)) == (5, 7, None)  # fmt: skip


def test_scores_that_are_no_numbers_are_an_error():
    """exp(min(700, nan)) is a number: 1e304."""
    (document,) = encode_documents(["ab"], lambda texts: [[1, 2] for _ in texts], 0)
    for nats in (float("nan"), float("inf")):
        with pytest.raises(TmexportError, match="computes NaN or infinite values on this text"):
            score_documents([document], lambda ids, nats=nats: nats)


def test_a_byte_order_mark_is_not_text(model, tmp_path):
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    for name, content, wanted in (("a.txt", b"one\ntwo", ["one\ntwo"]), ("a.jsonl", lines, ["one", "two"])):
        (tmp_path / name).write_bytes(BOM + content)
        assert list(read_documents(tmp_path / name)) == wanted
    (tmp_path / "ckpt").mkdir()
    for file in (model / "ckpt").iterdir():
        mark = BOM if file.suffix == ".json" else b""
        (tmp_path / "ckpt" / file.name).write_bytes(mark + file.read_bytes())
    plan_export(open_checkpoint(tmp_path / "ckpt"), "tq2_0", "f16").write(tmp_path / "m.gguf", lambda t: None)
    assert Tokenizer.from_gguf(tmp_path / "m.gguf").encode("one") == Tokenizer.from_gguf(model / "m.gguf").encode("one")
    plain, marked = (tmp_path / "plain.txt", tmp_path / "a.txt")
    plain.write_bytes(b"one\ntwo")
    assert scores(model, marked) == scores(model, plain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"texts": 1}\n', 'line 2 has no string "text"'),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud800"}\n', "line 2 has half of a surrogate pair"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text (invalid continuation byte at byte 3)"),
        ("a.txt", b"", "the text holds no token to score"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused_alike(model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for result in (
        invoke(evaluate, model / "ckpt", "--data", tmp_path / name),
        invoke(perplexity, model / "m.gguf", tmp_path / name, "--threads", 1),
    ):
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.stderr
        assert message.split(" (")[0] in result.stderr


def test_a_text_is_tokenised_once(model, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one two three " * 100)
    seen, real = [], Tokenizer.encode_all
    monkeypatch.setattr(Tokenizer, "encode_all", lambda self, texts: seen.extend(texts) or real(self, texts))
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: pytest.fail("tokenised again"))
    assert invoke(perplexity, model / "m.gguf", tmp_path / "a.txt", "--threads", 1).exit_code == 0
    assert seen == ["one two three " * 100]


def test_work_in_the_background_can_be_interrupted():
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_background(lambda: time.sleep(20))
    assert time.monotonic() - began < 5
    assert in_background(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)


def test_perplexity_ends_with_ctrl_c_while_it_tokenises(model, tmp_path):
    """A text that takes far longer than the wait: all of one document, inside one call of the library."""
    (tmp_path / "a.txt").write_text("one two three, the state of the union \n" * 1_000_000)
    process = subprocess.Popen([sys.executable, "-m", "runtime_ref.perplexity", str(model / "m.gguf"), str(tmp_path / "a.txt"), "--threads", "1"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    time.sleep(5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; no file was left half written"
