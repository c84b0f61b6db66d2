"""The page's WebAssembly: the logits of the numpy specification to the bit, and one line for a file that it cannot run."""

import hashlib
import json
import re
import struct

import numpy as np
import pytest

from runtime_ref.command import DEMO_MODEL as DEMO
from runtime_ref.gguf_source import gguf_source
from runtime_ref.reference import ReferenceModel
from runtime_ref.weights import load_weights
from scripts.web.build import SECTION, compiled, section, sources_digest
from tests.models import coded_tensors, random_tensors, random_ternary
from tests.onnx.exporting import run
from tests.web.running import PAGE, in_page
from tmexport.checkpoint import write_checkpoint
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model
from tmexport.web.models import CODES, VALUES

# name -> dimensions, kind of the projections (a number: ternary in such groups), options of tmexport gguf
CASES = {
    "tq1_0": ({"d_model": 256, "d_state": 16}, 256, ()),
    "tq2_0": ({"d_model": 256, "d_state": 64, "headdim": 32, "n_groups": 2}, 256, ("--type", "tq2_0")),
    "q2_0, groups of 64, narrow states": ({"d_model": 192, "d_state": 20, "headdim": 64, "n_groups": 3, "d_conv": 2}, 64, ()),
    "q2_0, groups of 128, rows that fill no tile": ({"d_model": 128, "d_state": 4, "headdim": 8, "n_groups": 32, "d_conv": 3}, 128, ()),
    "int8": ({"d_model": 96, "d_state": 32, "headdim": 64}, "int8", ("--embedding-type", "q8_0")),
    "dense": ({"d_model": 64, "d_state": 16, "headdim": 32}, "dense", ("--type", "f16", "--embedding-type", "q8_0")),
}  # fmt: skip


def write(folder, dimensions, kind, options, untied=False):
    model = mamba2_model(n_layer=2, vocab_size=301, tie_embeddings=not untied, **dimensions)
    if isinstance(kind, int):
        tensors = dict(random_tensors(model))
        for index, name in enumerate(model.projections):
            tensors[name] = random_ternary(*model.tensors[name].shape, kind, index)
    else:
        tensors = coded_tensors(model, kind)
    write_checkpoint(folder / "ckpt", model, tensors)
    path = folder / "model.gguf"
    assert run("gguf", folder / "ckpt", path, "--no-tokenizer", *options).exit_code == 0
    return path


def specified(path, prompt=12, decoded=4):
    """The digest by the numpy specification."""
    model = ReferenceModel(load_weights(gguf_source(path)), "exact")
    state, digest, vocab = model.new_state(), hashlib.sha256(), model.weights.config.vocab_size
    logits = np.zeros(vocab, np.float32)
    for i in range(prompt + decoded):
        logits = model.step(state, (7919 * i + 11) % vocab if i < prompt else int(logits.argmax()))
        digest.update(logits.tobytes())
    return digest.hexdigest()


def test_the_demo_models_digest_is_the_runtimes():
    (found,) = in_page(DEMO, prompt=256, decoded=64)
    assert found["sha256"].startswith("f50b487bc0887b48")
    assert found["weights"] <= 1.2 * found["file"] == 1.2 * DEMO.stat().st_size
    assert found["memory"] <= found["weights"] + found["state"] + 200_000


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("name", CASES)
def test_the_logits_are_the_specifications(tmp_path, name, untied):
    path = write(tmp_path, *CASES[name], untied)
    (found,) = in_page(path, chunk=997)
    assert found["sha256"] == specified(path)


def test_kernels_are_those_of_the_sources():
    module = (PAGE / "kernels.wasm").read_bytes()
    built = json.loads(module[module.index(SECTION.encode()) + len(SECTION) :])
    assert built["sources"] == sources_digest(), "run scripts/web/build.py"
    assert module.endswith(section(SECTION, json.dumps(built).encode()))


def test_both_sides_know_the_same_types():
    """What `tmexport web` gives to the kernels, and what the page reads, with the sizes of a block."""
    text = (PAGE / "gguf.mjs").read_text()
    read = re.findall(r'(\d+): \["(\w+)", (\d+), (\d+)\]', text[: text.index("};")])
    assert {(int(i), name, int(size), int(n_bytes)) for i, name, size, n_bytes in read} == {
        (int(kind), kind.name, kind.block_size, kind.row_bytes(kind.block_size)) for kind in CODES | VALUES
    }


@pytest.mark.network
def test_the_sources_compile_to_these_bytes():
    assert compiled() == (PAGE / "kernels.wasm").read_bytes()


def changed(path, name, data, old, new):
    assert data.count(old) == 1, name
    (path / name).write_bytes(data.replace(old, new))
    return path / name


def test_files_that_it_cannot_run_are_one_line_each(tmp_path):
    path = write(tmp_path, *CASES["q2_0, groups of 64, narrow states"])
    data, file = path.read_bytes(), open_gguf(path)
    key = b"mamba2.ssm.state_size" + struct.pack("<II", 4, 20)
    first = file.tensors["blk.0.ssm_in.weight"]

    def at(name, offset, new):
        (tmp_path / name).write_bytes(data[:offset] + new + data[offset + len(new) :])
        return tmp_path / name

    last = max(info.offset + info.nbytes for info in file.tensors.values())
    norm = file.tensors["blk.1.attn_norm.weight"]
    wrong = {
        at("magic", 0, b"ONNX"): "no GGUF",
        at("version", 4, struct.pack("<I", 7)): "version 7",
        changed(tmp_path, "arch", data, b"architecture" + struct.pack("<IQ", 8, 6) + b"mamba2", b"architecture" + struct.pack("<IQ", 8, 6) + b"llama3"): "is a llama3",
        changed(tmp_path, "state", data, key, key[:-4] + struct.pack("<I", 18)): "needs states of 4",
        changed(tmp_path, "count", data, key, key[:-4] + struct.pack("<I", 24)): "expected",
        changed(tmp_path, "group", data, b"tmexport.group_size", b"tmexport.grOup_size"): "tmexport.group_size is undefined",
        changed(tmp_path, "tensor", data, b"blk.1.ssm_norm", b"blk.1.ssm_nOrm"): "has no tensor blk.1.ssm_norm.weight",
        changed(tmp_path, "type", data, b"blk.1.ssm_in.weight" + struct.pack("<IQQI", 2, 192, first.shape[0], 42), b"blk.1.ssm_in.weight" + struct.pack("<IQQI", 2, 192, first.shape[0], 2)): "blk.1.ssm_in.weight has the type 2",
        at("code", first.offset + 2, b"\xff"): "blk.0.ssm_in.weight, rows 0 to 15: a code that is none",
        at("scale", first.offset, struct.pack("<H", 0x7C00)): "a scale that is not finite",
        at("norm", norm.offset, np.full(192, 3e38, np.float32).tobytes()): "layer 1's output holds an Inf or a NaN",
    }  # fmt: skip
    (tmp_path / "cut").write_bytes(data[: last - 1])
    (tmp_path / "header").write_bytes(data[:700])
    (tmp_path / "empty").write_bytes(b"")
    wrong |= {tmp_path / "cut": "truncated", tmp_path / "header": "truncated", tmp_path / "empty": "truncated"}
    for (name, words), found in zip(wrong.items(), in_page(*wrong), strict=True):
        assert words in found.get("error", "no error"), (name.name, found)
        assert "\n" not in found["error"]
    assert "differ" in in_page(groups_that_differ(tmp_path))[0]["error"]


def groups_that_differ(folder):
    """A recorded group of 128 over blocks of 64 with two scales."""
    path = write(folder / "differ", *CASES["q2_0, groups of 128, rows that fill no tile"])
    data, info = bytearray(path.read_bytes()), open_gguf(path).tensors["blk.0.ssm_in.weight"]
    data[info.offset : info.offset + 2] = struct.pack("<H", 0x2E66)
    path.write_bytes(data)
    return path


def test_damaged_headers_end_in_a_line(tmp_path):
    """Bytes changed at random before the first tensor: a refusal with words, or a model, and never a crash of the kernels."""
    path = write(tmp_path, *CASES["dense"])
    data, file = path.read_bytes(), open_gguf(path)
    end = min(info.offset for info in file.tensors.values())
    rng, files = np.random.default_rng(0), []
    for number in range(150):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            mutant[rng.integers(4, end)] = rng.integers(0, 256)
        files.append(tmp_path / f"{number}.gguf")
        files[-1].write_bytes(mutant)
    found = in_page(*files, prompt=2, decoded=1)
    assert all("sha256" in f or f["kind"] == "Error" for f in found), [f for f in found if f.get("kind") != "Error"]
    assert sum("error" in f for f in found) > 100
