"""generate: where the prompt comes from, GGUF and ONNX through one command, and what it refuses."""

import json
import os
import pty
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer

from runtime_ref.generate import generate
from runtime_ref.ort import OrtModel
from runtime_ref.sampling import Sampling
from runtime_ref.tokenizer import Tokenizer
from tests.commands import invoke
from tests.demo.running import ROOT
from tests.models import ternary_tensors, train_tokenizer
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.cli import cli
from tmexport.gguf.export import plan_export
from tmexport.model import mamba2_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model as m.gguf, m.onnx (form ort) and c.onnx (form custom), and bare.gguf without a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(folder / "tokenizer.json", 300)
    model = mamba2_model(d_model=256, n_layer=1, vocab_size=320, d_state=64)
    tensors = ternary_tensors(model, 64)
    tensors["backbone.embeddings.weight"] *= 0.1
    write_checkpoint(folder / "ckpt", model, tensors, tokenizer)
    write_checkpoint(folder / "bare", model, tensors, None)
    for name in ("ckpt", "bare"):
        plan_export(open_checkpoint(folder / name), "q2_0", "q8_0").write(folder / f"{name}.gguf", lambda t: None)
    for name, form in (("m", "ort"), ("c", "custom")):
        assert invoke(cli, "onnx", folder / "ckpt", folder / f"{name}.onnx", "--ops", form).exit_code == 0
    assert invoke(cli, "onnx", folder / "bare", folder / "bare.onnx").exit_code == 0
    return folder


def made(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def ids_of(folder, text):
    return HuggingFaceTokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


FILES = ("ckpt.gguf", "m.onnx")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_every_way_to_give_a_prompt_is_the_same(folder, tmp_path, file, ending):
    common = [folder / file, "-n", 3, "--json", "--threads", 1]
    text = "the state of\nthe union Ω"
    wanted = made(invoke(generate, *common, "--prompt", text))
    assert wanted["prompt_tokens"] == len(ids_of(folder, text))
    data = (text + ending).encode()
    (tmp_path / "p.txt").write_bytes(data)
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + data)
    ways = [
        invoke(generate, *common, "-p", text),
        invoke(generate, *common, "--prompt-file", tmp_path / "p.txt"),
        invoke(generate, *common, "--prompt-file", tmp_path / "bom.txt"),
        invoke(generate, *common, "--prompt-file", "-", stdin=data),
        invoke(generate, *common, "--prompt", "-", stdin=data),
        invoke(generate, *common, stdin=data),
        invoke(generate, *common, "--tokens", ",".join(map(str, ids_of(folder, text)))),
    ]
    for way in ways:
        found = made(way)
        for key in ("tokens", "logits_sha256", "prompt_tokens", "text"):
            assert found[key] == wanted[key]


def test_a_long_prompt(folder, tmp_path):
    """200 kB: more than an argument may have. Onnxruntime reads it in pieces; pieces give what one call gives."""
    text = "the union stone lamp " * 10_000
    wanted = len(ids_of(folder, text))
    for file in FILES:
        command = [sys.executable, "-m", "runtime_ref.generate", str(folder / file), "-n", "1", "--json", "--threads", "1"]  # fmt: skip
        done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["prompt_tokens"] == wanted
    model, ids = OrtModel.load(folder / "c.onnx", threads=1), ids_of(folder, text)[:1025]
    import numpy as np

    state = model.new_state()
    whole = model.run(state, np.array([ids]))[0, -1]
    pieces = model.prefill(model.new_state(), ids)
    assert np.abs(whole - pieces).max() < 1e-4 * np.abs(whole).max()


WRONG = [
    (["-p", "a", "--prompt-file", "x"], "two prompts: give --prompt TEXT"),
    (["-p", "a", "--tokens", "64"], "(-n is the number of tokens to make)"),
    (["--tokens", "1,x"], "--tokens is '1,x'; expected ids with commas between them"),
    (["--tokens", ""], "expected ids with commas between them"),
    (["--tokens", "99999"], "token 99999 is outside the vocabulary of 320"),
    (["--prompt-file", "none.txt"], "none.txt: cannot be read: No such file or directory"),
    (["-p", ""], "the prompt has no tokens"),
    (["-p", "a", "--temperature", "-1"], "temperature is -1"),
    (["-p", "a", "--top-p", "0"], "top-p is 0.0"),
    (["-p", "a", "--top-k", "-2"], "top-k is -2"),
    (["-p", "a", "--threads", "0"], "0 is not in the range 1<=x<=1024"),
    (["-p", "a\udcff"], "the text is not valid Unicode; expected UTF-8"),
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("args", "message"), WRONG, ids=lambda value: str(value)[:30].encode("ascii", "replace").decode())  # fmt: skip
def test_both_refuse_alike(folder, tmp_path, file, args, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(generate, folder / file, *args, "-n", 1)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr


def test_line_breaks_of_another_system_are_line_breaks_from_every_place(folder, tmp_path):
    common = [folder / "ckpt.gguf", "-n", 1, "--json", "--threads", 1]
    wanted = made(invoke(generate, *common, "--prompt", "the\n\nunion\nof"))
    (tmp_path / "p.txt").write_bytes(b"the\r\n\r\nunion\rof\r\n")
    ways = [
        invoke(generate, *common, "--prompt-file", tmp_path / "p.txt"),
        invoke(generate, *common, stdin=(tmp_path / "p.txt").read_bytes()),
    ]
    for way in map(made, ways):
        assert (way["prompt_tokens"], way["tokens"]) == (wanted["prompt_tokens"], wanted["tokens"])


def test_a_prompt_that_does_not_end(folder):
    """A device or a pipe: the memory is not filled with it."""
    command = [sys.executable, "-m", "runtime_ref.generate", str(folder / "ckpt.gguf"), "--threads", "1"]
    for number, said in enumerate(("stdin: is longer than 67108864 bytes", "/dev/zero: is longer than 67108864 bytes")):  # fmt: skip
        with open("/dev/zero", "rb") as endless:
            more = ["--prompt-file", "/dev/zero"] * number
            done = subprocess.run(
                [*command, *more], cwd=ROOT, stdin=endless, capture_output=True, text=True, check=False
            )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert said in done.stderr


@pytest.mark.parametrize("file", FILES)
def test_a_pipe_that_is_empty_or_not_utf8(folder, file):
    empty = invoke(generate, folder / file, stdin=b"")
    assert (empty.exit_code, "the prompt has no tokens" in empty.stderr) == (2, True)
    latin = invoke(generate, folder / file, stdin=b"caf\xe9")
    assert (latin.exit_code, latin.stderr.count("\n")) == (2, 1)
    assert "stdin: is not UTF-8 text" in latin.stderr


def test_a_terminal_is_not_waited_for(folder):
    """Without a prompt and without a pipe: what to do, at once."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "runtime_ref.generate", str(folder / "ckpt.gguf")]
    done = subprocess.run(command, cwd=ROOT, stdin=theirs, capture_output=True, text=True, check=False, timeout=60)
    os.close(ours)
    os.close(theirs)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no prompt: give --prompt TEXT, --prompt-file FILE")
    closed = subprocess.run(["sh", "-c", f"exec '{sys.executable}' -m runtime_ref.generate '{folder}/ckpt.gguf' <&-"], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert (closed.returncode, closed.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("file", FILES)
def test_errors_of_the_output(folder, file):
    """A full device and a non-UTF-8 pipe, for both kinds of file."""
    command = [sys.executable, "-m", "runtime_ref.generate", str(folder / file), "-p", "Ω the", "-n", "2", "--threads", "1"]  # fmt: skip
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("compil")]
    assert (done.returncode, said) == (1, ["error: the output cannot be written: No space left on device"])
    narrow = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "cp1252"})  # fmt: skip
    assert narrow.returncode == 0, narrow.stderr
    assert narrow.stdout.startswith(b"\\u03a9 the")
    legacy = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, env=os.environ | legacy)
    assert done.stdout.startswith("Ω the".encode()), done.stderr  # the prompt too is read as UTF-8
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "-", *command], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert (closed.returncode, closed.stderr.count("\n"), closed.stdout) == (0, 1, ""), closed.stderr


@pytest.mark.parametrize(
    ("file", "args", "message"),
    [
        ("m.onnx", ["--profile", "fast"], "--profile is for a GGUF"),
        ("m.onnx", ["--load-state", "s"], "--load-state is for a GGUF"),
        ("m.onnx", ["--save-state", "s"], "--save-state is for a GGUF"),
        ("m.onnx", ["--max-memory", "1G"], "--max-memory is for a GGUF"),
        ("ckpt.gguf", ["--kernels"], "--kernels is for an ONNX file"),
    ],
)
def test_options_of_the_other_kind_are_refused(folder, file, args, message):
    result = invoke(generate, folder / file, "-p", "a", *args)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("file", ["bare.gguf", "bare.onnx"])
def test_a_file_without_a_tokenizer_takes_ids(folder, file):
    common = [folder / file, "-n", 4, "--threads", 1]
    ids = ids_of(folder, "the union")
    text = ",".join(map(str, ids))
    found = made(invoke(generate, *common, "--tokens", text, "--json"))
    with_tokenizer = "ckpt.gguf" if file.endswith("gguf") else "m.onnx"
    wanted = made(invoke(generate, folder / with_tokenizer, "-n", 4, "--threads", 1, "-p", "the union", "--json"))
    assert (found["tokens"], found["logits_sha256"]) == (wanted["tokens"], wanted["logits_sha256"])
    assert found["text"] is None
    shown = invoke(generate, *common, "--tokens", text)
    assert shown.stdout == " ".join(map(str, [*ids, *found["tokens"]])) + "\n"
    refused = invoke(generate, *common, "-p", "the union")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)
    assert "name one with --tokenizer, or give the prompt as --tokens 1,2,3" in refused.stderr
    given = made(invoke(generate, *common, "-p", "the union", "--tokenizer", folder / "tokenizer.json", "--json"))
    assert given["tokens"] == wanted["tokens"]


def test_the_onnx_generator_samples_as_the_runtime_does(folder):
    """The same logits (custom form, our kernels) give the same tokens for every way of choosing."""
    for options in (["--temperature", 1.5, "--seed", 3], ["--temperature", 2, "--top-k", 5], ["--temperature", 2, "--top-p", 0.7]):  # fmt: skip
        common = ["-p", "the", "-n", 8, "--json", "--threads", 1, *options]
        ours = made(invoke(generate, folder / "ckpt.gguf", *common))
        theirs = made(invoke(generate, folder / "c.onnx", "--kernels", *common))
        assert theirs["tokens"] == ours["tokens"]
        assert theirs["logits_sha256"] == ours["logits_sha256"]
    drawn = OrtModel.load(folder / "m.onnx", threads=1).generate([1, 2], 5, Sampling(2.0, top_k=1))
    greedy = OrtModel.load(folder / "m.onnx", threads=1).generate([1, 2], 5)
    assert list(drawn) == list(greedy)


def test_streaming_decodes_a_few_tokens_at_a_time(folder, monkeypatch):
    """Not the whole text for every token: its cost would grow with the square of the length."""
    longest, real = [], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: longest.append(len(ids)) or real(self, ids))
    result = invoke(generate, folder / "m.onnx", "-p", "the", "-n", 60, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert max(longest) <= 16


@pytest.mark.parametrize("module", ["tmexport.onnx.generate", "runtime_ref.generate"])
def test_the_older_names_still_work(folder, module):
    command = [sys.executable, "-m", module, str(folder / "m.onnx"), "--prompt", "the", "-n", "2", "--json", "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["tokens"] == made(invoke(generate, folder / "m.onnx", "-p", "the", "-n", 2, "--json"))["tokens"]  # fmt: skip
