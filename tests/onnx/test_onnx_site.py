"""`tmexport web`: the folder is complete and refers to nothing outside it. Running it: scripts/peers/check_web.py."""

import json
import re

import onnxruntime as ort
import pytest

from tests.models import ternary_tensors
from tests.onnx.exporting import TIED, feed, run, token_ids
from tmexport.checkpoint import write_checkpoint
from tmexport.onnx.site import PACKAGES


@pytest.fixture
def node_modules(tmp_path):
    """The packages' files by name; what is in them only a browser minds."""
    for package, _, names in PACKAGES:
        for name in names:
            path = tmp_path / "node_modules" / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{package} {name}")
    return tmp_path / "node_modules"


def test_the_folder_is_complete(tied, tmp_path, node_modules):
    site = tmp_path / "site"
    result = run("web", tied.path, site, "--runtime", node_modules, "--title", "A <b>model</b>", "--json")
    files = {str(p.relative_to(site)): p.stat().st_size for p in site.rglob("*") if p.is_file()}
    assert json.loads(result.stdout)["files"] == files
    assert sorted(files) == [
        "app.mjs", "index.html", "model.config.json", "model.onnx", "model.tokenizer.json", "style.css",
        "vendor/ort-wasm-simd-threaded.mjs", "vendor/ort-wasm-simd-threaded.wasm", "vendor/ort.wasm.min.mjs",
        "vendor/tokenizers.LICENSE", "vendor/tokenizers.min.mjs",
    ]  # fmt: skip
    page = (site / "index.html").read_text()
    assert "A &lt;b&gt;model&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "{{" not in page
    for name in ("index.html", "app.mjs", "style.css"):
        assert re.findall(r"https?://|//[a-z]+\.", (site / name).read_text()) == []
    referred = set(re.findall(r'"\./(vendor/[^"]+\.mjs)"', (site / "app.mjs").read_text()))
    assert referred == {"vendor/ort.wasm.min.mjs", "vendor/tokenizers.min.mjs"}
    assert run("verify", tied.path, site / "model.onnx").exit_code == 0
    assert feed(ort.InferenceSession(site / "model.onnx"), TIED, token_ids(TIED, 1, 5)).shape == (1, 1, TIED.vocab_size)


def test_bad_input_is_one_line(tied, tmp_path, node_modules, monkeypatch):
    def fails(result, code, words):
        assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
        assert words in result.stderr
        assert not (tmp_path / "site").exists()

    bare = tmp_path / "bare"
    write_checkpoint(bare, TIED, ternary_tensors(TIED, 64))
    fails(run("web", bare, tmp_path / "site", "--runtime", node_modules), 2, "has no tokenizer.json")
    fails(run("web", tied.path, tmp_path / "site", "--runtime", tmp_path), 1, "expected a node_modules folder")
    with monkeypatch.context() as patch:
        patch.setattr("tmexport.onnx.writer.LARGEST_FILE", 100_000)
        fails(run("web", tied.path, tmp_path / "site", "--runtime", node_modules), 2, "more than a page can hold")
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(run("web", tied.path, tmp_path / "site"), 2, "npm is not installed")
    (tmp_path / "npm").write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    fails(run("web", tied.path, tmp_path / "site"), 1, "npm cannot fetch onnxruntime-web 1.30.0: no network")
