"""What doctor says loads a file, against the programs themselves: llama.cpp, in a process of its own, and our commands."""

import gzip
import json
import subprocess
import sys
from functools import partial

import gguf
import pytest

from tests.commands import invoke
from tests.models import write_small
from tests.tmexport.families import save
from tests.tmexport.test_doctor import KEYS, file
from tmexport.checkpoint import open_checkpoint
from tmexport.cli import cli
from tmexport.doctor import OURS, diagnose
from tmexport.doctor.types import STOCK, TYPES
from tmexport.gguf.export import plan_export
from tmexport.gguf.reader import open_gguf
from tmexport.gguf.writer import PlannedTensor, write_gguf

K = "tokenizer.ggml."
# name: (keys that are changed, None: left out; does llama.cpp load it; do our commands; what is said of it)
CHANGED = {
    "nothing": ({}, True, True, ""),
    "tokens are no list": ({K + "tokens": "abc"}, False, False, "tokenizer.ggml.tokens is 'abc'; expected a list of texts"),
    "tokens are numbers": ({K + "tokens": [1, 2]}, False, False, "expected a list of texts"),
    "types are texts": ({K + "token_type": ["a"] * 512}, False, False, "expected a list of whole numbers"),
    "merges are a text": ({K + "merges": "a b"}, False, False, "expected a list of texts"),
    "an end token is a text": ({K + "eos_token_id": "x"}, False, False, "expected a whole number"),
    "an end token is true": ({K + "eos_token_id": True}, False, False, "expected a whole number"),
    "bos is 1": ({K + "add_bos_token": 1}, False, False, "tokenizer.ggml.add_bos_token is 1; expected true or false"),
    "a name is a number": ({"general.name": 3}, False, False, "general.name is 3; expected a text"),
    "a damaged template": ({"tokenizer.chat_template": "{% for %}"}, False, True, "its chat template is damaged"),
    "a template is a number": ({"tokenizer.chat_template": 1}, True, False, "tokenizer.chat_template is 1; expected a text"),
    "fewer types": ({K + "token_type": [1]}, False, True, "has 512 tokens and 1 token types"),
    "no merges": ({K + "merges": None}, False, True, "has no tokenizer.ggml.merges"),
    "no tokenizer": ({K + "model": None}, False, True, "has no tokenizer.ggml.model"),
    "another's tokenizer": ({K + "model": "llama", "tokenizer.huggingface.json": None}, True, True, "our commands need --tokenizer"),
    "another split": ({K + "pre": "gpt-4o", "tokenizer.huggingface.json": None}, True, True, "splits text as 'gpt-4o'"),
    "a damaged tokenizer.json": ({"tokenizer.huggingface.json": "{"}, True, True, "is not a tokenizer.json"),
    "no epsilon": ({"mamba2.attention.layer_norm_rms_epsilon": None}, False, False, "the norm's epsilon is None"),
    "more layers": ({"mamba2.block_count": 3}, False, False, "has no tensor blk.2"),
    "no width": ({"mamba2.embedding_length": None}, False, False, "has no mamba2.embedding_length, without which"),
    "no number of layers": ({"mamba2.block_count": None}, False, False, "has no mamba2.block_count, without which"),
    "an adapter": ({"general.type": "adapter"}, True, True, "is no model by itself: its general.type is 'adapter'"),
    "a part": ({"split.count": 3, "split.no": 0}, False, False, "is a part of a split model; part-00002-of-00003.gguf is not beside it"),
}  # fmt: skip
LLAMA = """
import sys, urllib.request, xllamacpp
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy between us and ourselves
for path in sys.argv[1:]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 64, False, -1
    server = None
    try:
        server = xllamacpp.Server(params)
        opener.open(server.listening_address + "/slots", timeout=60).read()
        print("LOADS", path)
    except Exception as error:
        print("NOT" if server is None else f"FAILED {error!r}", path)
    server = None
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model with its keys changed in each of these ways, by name."""
    folder = tmp_path_factory.mktemp("files")
    write_small(folder / "ckpt", group_size=256)
    plan_export(open_checkpoint(folder / "ckpt")).write(folder / "m.gguf", lambda tensor: None)
    whole = open_gguf(folder / "m.gguf")
    tensors = [PlannedTensor(t.name, t.shape, t.type, partial(whole.blocks, t.name)) for t in whole.tensors.values()]
    made = {}
    for number, (name, (keys, *_)) in enumerate(CHANGED.items()):
        made[name] = folder / ("part-00001-of-00003.gguf" if name == "a part" else f"{number}.gguf")
        metadata = {k: list(v) if hasattr(v, "__len__") and not isinstance(v, str) else v for k, v in whole.metadata.items()}  # fmt: skip
        metadata = {k: v for k, v in (metadata | keys).items() if v is not None}
        write_gguf(made[name], metadata, tensors)
    return made


@pytest.fixture(scope="module")
def loaded(files):
    """The files that llama.cpp loads."""
    command = [sys.executable, "-c", LLAMA, *map(str, files.values())]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=300)
    said = [line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("LOADS ", "NOT "))]
    assert len(said) == len(files), [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return {name for name, path in files.items() if ["LOADS", str(path)] in said}


@pytest.mark.parametrize("name", CHANGED)
def test_what_loads_a_file(files, loaded, name):
    _, stock, ours, said = CHANGED[name]
    found = diagnose(files[name])
    assert stock is (name in loaded)
    assert found.loads == [STOCK] * stock + [OURS] * (ours and name != "an adapter")
    assert any(said in sentence for sentence in [*found.problems, *found.notes]) or not said
    ran = invoke(cli, "generate", files[name], "--tokens", "1,2", "-n", 1, "--threads", 1, "--json")
    assert (ran.exit_code == 0) is ours, ran.stderr
    assert ours or (ran.stderr.count("\n") == 1 and "unexpected" not in ran.stderr)


def test_every_type_of_ggml_has_its_name_and_size():
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        # what both know; of Q8_1, gguf-py still has its two sums in fp32; ggml.h: 2 + 2 + 32 bytes
        if kind in TYPES and kind.name != "Q8_1":
            assert (TYPES[kind].name, TYPES[kind].block, TYPES[kind].bytes) == (kind.name, block, size)


@pytest.mark.parametrize("family", ["granite", "falcon", "llama"])
def test_families_with_attention_are_ours_too(tmp_path, family):
    save(family, tmp_path / "ckpt")
    assert invoke(cli, "gguf", tmp_path / "ckpt", tmp_path / "m.gguf", "--type", "f16").exit_code == 0
    assert diagnose(tmp_path / "m.gguf").loads[-1] == OURS


def test_types_that_our_programs_do_not_read(tmp_path):
    """A Q4_K is no fault of the file; indices in place of weights are."""
    keys = KEYS | {"general.architecture": "llama", "llama.embedding_length": 256, "llama.block_count": 1}
    found = diagnose(file(tmp_path / "k.gguf", keys, (("w.weight", (256, 6), 12, None),), bytes(6 * 144)))
    assert (found.types, found.problems, found.loads) == ({"Q4_K": 1}, [], [STOCK])
    assert found.notes[0].startswith("our commands do not load it: 'w.weight' has the type 12")
    found = diagnose(file(tmp_path / "i.gguf", keys, (("w.weight", (256, 6), 26, None),), bytes(6 * 1024)))
    assert (found.problems, found.loads) == (["1 matrices are I32, a type that llama.cpp does not multiply with"], [])


NO_GGUF = {
    "gzip": (gzip.compress(b"GGUF" * 99), "is compressed; unpack it (gunzip)"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a git-lfs pointer"),
    "page": (b"<!DOCTYPE html><html><head></head></html>", "is a web page"),
    "before GGUF": (b"tjgg" + bytes(99), "is in a format of llama.cpp from before GGUF"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(99), "is a big-endian GGUF file"),
    "short": (b"GGUF", "has 4 bytes; a GGUF header needs at least 24"),
    "empty": (b"", "has 0 bytes"),
}


@pytest.mark.parametrize("name", NO_GGUF)
def test_what_is_no_gguf_is_named_by_every_command(tmp_path, name):
    data, said = NO_GGUF[name]
    (tmp_path / "m.gguf").write_bytes(data)
    found = invoke(cli, "doctor", tmp_path / "m.gguf", "--json")
    assert found.exit_code == 1
    (problem,) = json.loads(found.stdout)["problems"]
    assert problem.startswith(said)
    for command in (("inspect",), ("generate", "-p", "a")):
        ran = invoke(cli, command[0], tmp_path / "m.gguf", *command[1:])
        assert (ran.exit_code, ran.stderr.count("\n"), said in ran.stderr) == (1, 1, True), ran.stderr
