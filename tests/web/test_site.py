"""`tmexport web`: the folder is complete and refers to nothing outside it. Running it: scripts/peers/check_web.py."""

import hashlib
import json
import re

import onnxruntime as ort
import pytest

from tests.models import coded_tensors, ternary_tensors, train_tokenizer
from tests.onnx.exporting import TIED, feed, run, token_ids, write_ternary
from tests.web.running import in_page
from tmexport.checkpoint import write_checkpoint
from tmexport.web.vendor import ONNXRUNTIME, TOKENIZERS

SHARED = ["app.mjs", "download.mjs", "index.html", "model.tokenizer.json", "page.json", "storage.mjs", "style.css",
          "vendor/tokenizers.LICENSE", "vendor/tokenizers.min.mjs", "worker.js"]  # fmt: skip
PACKED = ["gguf.mjs", "kernels.wasm", "layout.mjs", "model.gguf", "packed.mjs"]
ONNX = ["model.config.json", "model.onnx", "onnx.mjs", "vendor/ort-wasm-simd-threaded.mjs", "vendor/ort-wasm-simd-threaded.wasm",
        "vendor/ort.wasm.min.mjs"]  # fmt: skip


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_ternary(tmp_path_factory.mktemp("tied") / "ckpt", TIED, 64)


@pytest.fixture
def node_modules(tmp_path):
    """The packages' files by name; what is in them only a browser minds."""
    for package in (ONNXRUNTIME, TOKENIZERS):
        for name in package.files:
            path = tmp_path / "node_modules" / package.name / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{package.name} {name}")
    return tmp_path / "node_modules"


def complete(site, result, wanted):
    """The folder holds these files, page.json says so, and no file names another place or a file that is not there."""
    files = {str(p.relative_to(site)): p.stat().st_size for p in site.rglob("*") if p.is_file()}
    page = json.loads((site / "page.json").read_text())
    assert json.loads(result.stdout) == {"folder": str(site), "engine": page["engine"], "files": files}
    assert sorted(files) == sorted(SHARED + wanted)
    assert {*page["files"], page["model"], "page.json", "index.html"} == set(files)
    model = (site / page["model"]).read_bytes()
    assert (page["sha256"], page["bytes"]) == (hashlib.sha256(model).hexdigest(), len(model))
    for name in (n for n in files if not n.startswith(("vendor/", "model"))):
        text = (site / name).read_bytes().decode("utf-8", "ignore")
        assert re.findall(r"https?://|//[a-z]+\.", text) == []
        if name.endswith(".mjs") and name != "app.mjs":
            assert set(re.findall(r'from "\./([^"]+)"', text)) <= set(files)
    return page


def test_a_ternary_mamba2_is_a_gguf_with_its_kernels(tied, tmp_path, node_modules):
    site = tmp_path / "site"
    page = complete(site, run("web", tied.path, site, "--runtime", node_modules, "--title", "A <b>model</b>", "--json"), PACKED)  # fmt: skip
    shown = (site / "index.html").read_text()
    assert "A &lt;b&gt;model&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert "{{" not in shown
    assert page["stop"] == [0]
    assert run("verify", tied.path, site / "model.gguf").exit_code == 0
    assert "sha256" in in_page(site / "model.gguf")[0]
    # The GGUF itself gives the same page.
    again = complete(tmp_path / "again", run("web", site / "model.gguf", tmp_path / "again", "--runtime", node_modules, "--json"), PACKED)  # fmt: skip
    assert again == page
    assert (tmp_path / "again" / "model.tokenizer.json").read_text() == (site / "model.tokenizer.json").read_text()
    assert "<h1>model</h1>" in (tmp_path / "again" / "index.html").read_text()


def test_what_the_kernels_do_not_run_is_onnx(tmp_path, node_modules):
    tokenizer = train_tokenizer(tmp_path / "tokenizer.json", 300)
    write_checkpoint(tmp_path / "ckpt", TIED, coded_tensors(TIED, "binary"), tokenizer)
    site = tmp_path / "site"
    complete(site, run("web", tmp_path / "ckpt", site, "--runtime", node_modules, "--json"), ONNX)
    assert run("verify", tmp_path / "ckpt", site / "model.onnx").exit_code == 0
    assert feed(ort.InferenceSession(site / "model.onnx"), TIED, token_ids(TIED, 1, 5)).shape == (1, 1, TIED.vocab_size)


def test_a_gguf_needs_a_tokenizer_and_kernels_that_run_it(tied, tmp_path, node_modules):
    bare, site = tmp_path / "bare.gguf", tmp_path / "site"
    assert run("gguf", tied.path, bare, "--no-tokenizer").exit_code == 0
    result = run("web", bare, site, "--runtime", node_modules)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "give the model's tokenizer.json with --tokenizer" in result.stderr
    page = complete(site, run("web", bare, site, "--runtime", node_modules, "--tokenizer", tied.tokenizer, "--json"), PACKED)  # fmt: skip
    assert page["stop"] == [0]
    write_checkpoint(tmp_path / "ckpt", TIED, coded_tensors(TIED, "binary"), tied.tokenizer)
    binary = tmp_path / "binary.gguf"
    assert run("gguf", tmp_path / "ckpt", binary).exit_code == 0
    result = run("web", binary, tmp_path / "no", "--runtime", node_modules)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "ssm_in.weight is Q1_0; a page runs such a model as ONNX: give the checkpoint's folder" in result.stderr


def test_bad_input_is_one_line(tied, tmp_path, node_modules, monkeypatch):
    def fails(result, code, words):
        assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
        assert words in result.stderr
        assert not (tmp_path / "site").exists()

    bare, large = tmp_path / "bare", tmp_path / "large"
    write_checkpoint(bare, TIED, ternary_tensors(TIED, 64))
    write_checkpoint(large, TIED, coded_tensors(TIED, "binary"), train_tokenizer(tmp_path / "tokenizer.json", 300))
    fails(run("web", bare, tmp_path / "site", "--runtime", node_modules), 2, "has no tokenizer.json")
    fails(run("web", tied.path, tmp_path / "site", "--runtime", tmp_path), 1, "expected a node_modules folder")
    with monkeypatch.context() as patch:
        patch.setattr("tmexport.onnx.writer.LARGEST_FILE", 100_000)
        fails(run("web", large, tmp_path / "site", "--runtime", node_modules), 2, "more than a page can hold")
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(run("web", tied.path, tmp_path / "site"), 2, "npm is not installed")
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    fails(run("web", tied.path, tmp_path / "site"), 1, "npm cannot fetch @huggingface/tokenizers 0.2.0: no network")
