"""llama.cpp's tokens of what was exported: random features, 24 scripts, and files without a tokenizer."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from tokenizers import Tokenizer

from tests.llama import Llama
from tests.models import train_tokenizer, write_small
from tests.tokenizer.random_features import check, trained
from tests.tokenizer.samples import SCRIPTS
from tmexport.cli import cli
from tmexport.errors import TmexportError
from tmexport.model import mamba2_model
from tmexport.tokenizer import texts
from tmexport.tokenizer.gguf import export_tokenizer, vocabulary_as_json
from tmexport.tokenizer.parse import parse_tokenizer
from tmexport.tokenizer.splits import NAMES, as_json
from tmexport.tokenizer.texts import LlamaTokenizer, first_difference


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def test_random_features(tmp_path):
    verdicts = [check(seed, tmp_path, texts=10) for seed in range(60)]
    assert [what for verdict, what in verdicts if verdict == "DIFFERENT"] == []
    assert {"refused", "warned", "equal"} == {verdict for verdict, _ in verdicts}


@pytest.mark.parametrize("kept", ["no token of two characters", "every token"])
def test_a_vocabulary_without_merges(tmp_path, kept):
    """llama.cpp wants a merge: the one that is written changes nothing."""
    raw = json.loads(trained(1))
    raw["model"]["merges"] = []
    if kept != "every token":
        raw["model"]["vocab"] = {t: i for i, t in enumerate(t for t in raw["model"]["vocab"] if len(t) == 1)}
        raw["added_tokens"] = []
    (tmp_path / "t.json").write_text(json.dumps(raw))
    exported = export_tokenizer(tmp_path / "t.json", mamba2_model(d_model=64, n_layer=1, vocab_size=700))
    (merge,) = exported.metadata["tokenizer.ggml.merges"]
    ours = parse_tokenizer(exported.text, "t.json")
    with LlamaTokenizer(exported.metadata) as theirs:
        texts = [*SCRIPTS, merge, merge.replace(" ", ""), 3 * merge.replace(" ", "")]
        assert first_difference(texts, lambda text: ours.encode(text).ids, theirs.tokenize) is None


@pytest.mark.parametrize(("steps", "ignore_merges"), NAMES, ids=NAMES.values())
def test_every_way_of_splitting_in_every_script_and_back_from_the_keys(tmp_path, steps, ignore_merges):
    raw = json.loads(trained(1))
    raw["pre_tokenizer"], raw["model"]["ignore_merges"] = as_json(steps), ignore_merges
    (tmp_path / "t.json").write_text(json.dumps(raw))
    exported = export_tokenizer(tmp_path / "t.json", mamba2_model(d_model=64, n_layer=1, vocab_size=700))
    assert exported.metadata["tokenizer.ggml.pre"] == NAMES[steps, ignore_merges]
    ours = parse_tokenizer(exported.text, "exported")
    read_back = parse_tokenizer(vocabulary_as_json(exported.metadata, "keys"), "keys")
    with LlamaTokenizer(exported.metadata) as llama:
        assert first_difference(SCRIPTS, lambda text: ours.encode(text).ids, llama.tokenize) is None
    assert (
        first_difference(SCRIPTS, lambda text: ours.encode(text).ids, lambda text: read_back.encode(text).ids) is None
    )


def test_verify_texts(tmp_path):
    write_small(tmp_path / "ckpt", group_size=256)
    path = tmp_path / "ckpt" / "tokenizer.json"
    raw = json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}
    path.write_text(json.dumps(raw))
    warned = run("gguf", tmp_path / "ckpt", tmp_path / "m.gguf")
    assert warned.stderr.startswith("warning: the tokenizer composes characters first (NFC)")
    (tmp_path / "same.txt").write_text("\n".join(SCRIPTS[:3]))
    found = run("verify", tmp_path / "ckpt", tmp_path / "m.gguf", "--texts", tmp_path / "same.txt", "--json")
    assert json.loads(found.stdout)["texts"]["texts"] == 1
    (tmp_path / "nfc.txt").write_text("a cafe\u0301")
    differs = run("verify", tmp_path / "ckpt", tmp_path / "m.gguf", "--texts", tmp_path / "nfc.txt")
    assert (differs.exit_code, "the tokenizer gives [" in str(differs.exception)) == (1, True)
    (tmp_path / "half.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n')
    half = run("verify", tmp_path / "ckpt", tmp_path / "m.gguf", "--texts", tmp_path / "half.jsonl")
    assert str(half.exception).endswith("text 2 has half of a surrogate pair, which is no character")


def test_a_server_that_ends_at_once_does_not_wait_for_ever(tmp_path):
    """llama.cpp's queue starts after the server answers; ended between the two, it never stops (2 of 2 tries hung under load)."""
    tokenizer = train_tokenizer(tmp_path / "tokenizer.json")
    code = (
        "import sys; from pathlib import Path; from tmexport.tokenizer.gguf import export_tokenizer\n"
        "from tmexport.model import mamba2_model; from tmexport.tokenizer.texts import LlamaTokenizer\n"
        "keys = export_tokenizer(Path(sys.argv[1]), mamba2_model(256, 1, 512, d_state=64)).metadata\n"
        "for _ in range(20):\n    with LlamaTokenizer(keys): pass"
    )
    subprocess.run([sys.executable, "-c", code, tokenizer], check=True, timeout=100)


def test_without_xllamacpp_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(TmexportError, match="xllamacpp is not installed"):
        texts.LlamaTokenizer({})


def test_no_tokenizer_gives_a_file_that_llamacpp_runs(tmp_path):
    write_small(tmp_path / "ckpt", group_size=256)
    assert run("gguf", tmp_path / "ckpt", tmp_path / "m.gguf", "--no-tokenizer").exit_code == 0
    assert run("verify", tmp_path / "ckpt", tmp_path / "m.gguf").exit_code == 0
    llama = Llama.__new__(Llama)
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "m.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 64, 1, False, -1
    llama._server = xllamacpp.Server(params)
    answer = llama._post("/completion", {"prompt": [5, 6, 7], "n_predict": 3, "temperature": 0, "return_tokens": True})
    assert len(answer["tokens"]) == 3


@pytest.mark.parametrize("verb", ["gguf", "onnx"])
def test_verify_of_another_tokenizer_by_the_same_flag(tmp_path, verb):
    """The file holds the tokenizer that --tokenizer named; verify is told the same, and then nothing else is equal."""
    write_small(tmp_path / "ckpt", group_size=256)
    other = train_tokenizer(tmp_path / "other.json", 300)
    own, made, bare = tmp_path / "ckpt" / "tokenizer.json", tmp_path / f"m.{verb}", tmp_path / f"bare.{verb}"
    assert own.read_bytes() != other.read_bytes()
    assert run(verb, tmp_path / "ckpt", made, "--tokenizer", other).exit_code == 0
    assert run(verb, tmp_path / "ckpt", bare, "--no-tokenizer").exit_code == 0
    verdicts = {
        (path.stem, flag): run("verify", tmp_path / "ckpt", path, *(() if flag is None else ("--tokenizer", flag)))
        for path in (made, bare)
        for flag in (None, own, other)
    }
    assert {key: verdict.exit_code for key, verdict in verdicts.items()} == {
        ("m", None): 1, ("m", own): 1, ("m", other): 0, ("bare", None): 0, ("bare", own): 1, ("bare", other): 1,
    }  # fmt: skip
    assert f"tokenizer: expected the text of {own}" in str(verdicts["m", None].exception)
    if verb == "gguf":
        (tmp_path / "texts.txt").write_text("the Union of the States\n")
        compared = run("verify", tmp_path / "ckpt", made, "--tokenizer", other, "--texts", tmp_path / "texts.txt", "--json")  # fmt: skip
        assert json.loads(compared.stdout)["texts"]["tokens"] == len(Tokenizer.from_file(str(other)).encode("the Union of the States\n").ids)  # fmt: skip
