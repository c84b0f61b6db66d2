"""`tmexport onnx` and `python -m tmexport.onnx.generate` as a user types them; what they refuse, and that nothing is left."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from runtime_ref.generate import generate as generate_command
from runtime_ref.ort import OrtModel
from tests.models import random_tensors, ternary_tensors
from tests.onnx.exporting import FORMS, TIED, peer_model, run
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.model import mamba2_model


@pytest.mark.parametrize("form", FORMS)
def test_export_writes_three_files_and_says_so(tied, tmp_path, form):
    result = run("onnx", tied.path, tmp_path / "m.onnx", "--ops", form, "--json")
    report = json.loads(result.stdout)
    assert (report["ops"], report["group_size"], report["bytes"]) == (form, 64, (tmp_path / "m.onnx").stat().st_size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.config.json", "m.onnx", "m.tokenizer.json"]
    assert (tmp_path / "m.tokenizer.json").read_bytes() == tied.tokenizer.read_bytes()
    described = json.loads((tmp_path / "m.config.json").read_text())
    assert described["state"][1] == {"input": "past_ssm.0", "output": "present_ssm.0", "shape": ["batch", 16, 32, 32],
                                     "dtype": "float32", "initial": 0.0}  # fmt: skip
    assert run("onnx", tied.path, tmp_path / "m.onnx", "--ops", form).stdout.startswith(f"{tmp_path / 'm.onnx'}: 0.")


def test_weights_take_little_more_than_the_gguf_of_the_same_types(tmp_path):
    """At a shape where the weights count; the GGUF's own size is the measure."""
    config = mamba2_model(d_model=512, n_layer=6, vocab_size=4096)
    write_checkpoint(tmp_path / "ckpt", config, ternary_tensors(config, 256))
    gguf = json.loads(run("gguf", tmp_path / "ckpt", tmp_path / "m.gguf", "--type", "tq2_0", "--embedding-type", "q8_0", "--json").stdout)  # fmt: skip
    sizes = {f: json.loads(run("onnx", tmp_path / "ckpt", tmp_path / "m.onnx", "--ops", f, "--json").stdout)["bytes"] for f in FORMS}  # fmt: skip
    assert sizes["custom"] < 1.02 * gguf["bytes"]
    assert sizes["portable"] < 1.06 * gguf["bytes"]
    assert sizes["ort"] < 1.10 * gguf["bytes"]


def refused(folder, result, words, code=1):
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
    assert words in result.stderr
    assert [p.name for p in folder.iterdir()] == []


def test_bad_input_is_one_line_and_leaves_nothing(tied, tmp_path):
    out, dense, odd = tmp_path / "out", tmp_path / "dense", tmp_path / "odd"
    out.mkdir()
    write_checkpoint(dense, TIED, random_tensors(TIED))
    write_checkpoint(odd, TIED, ternary_tensors(TIED, 64))
    raw = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(raw | {"time_step_limit": [0.0, 0.1]}))
    refused(out, run("onnx", tmp_path / "none", out / "m.onnx"), "no such folder")
    refused(out, run("onnx", dense, out / "m.onnx"), "is not ternary")
    refused(out, run("onnx", odd, out / "m.onnx"), "dt is clamped")
    refused(out, run("onnx", tied.path, out / "m.onnx", "--opset", 9), "--opset is 9; expected 23", 2)
    refused(out, run("onnx", tied.path, out / "no" / "m.onnx"), "cannot be written")
    refused(out, run("onnx", tied.path, out / "m.onnx", "--tokenizer", tmp_path / "none.json"), "cannot be read")
    assert run("onnx", tied.path, tied.path / "config.json").exit_code == 2
    assert run("onnx", tied.path, out / "m.onnx", "--ops", "fast").exit_code == 2


def test_a_weight_that_cannot_be_written_leaves_nothing(tied, tmp_path):
    tensors = ternary_tensors(TIED, 64)
    tensors["backbone.norm_f.weight"][3] = np.nan
    write_checkpoint(tmp_path / "ckpt", TIED, tensors, tied.tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    refused(out, run("onnx", tmp_path / "ckpt", out / "m.onnx"), "backbone.norm_f.weight: holds NaN")


def test_a_checkpoint_without_a_tokenizer_is_exported_with_a_warning(tmp_path):
    write_checkpoint(tmp_path / "ckpt", TIED, ternary_tensors(TIED, 64))
    result = run("onnx", tmp_path / "ckpt", tmp_path / "m.onnx")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: no tokenizer.json in the checkpoint")
    assert not (tmp_path / "m.tokenizer.json").exists()


def test_help_has_an_example():
    for command in ("onnx", "web"):
        assert "Example" in run(command, "--help").stdout
    assert "Example" in CliRunner().invoke(generate_command, ["--help"]).stdout


def test_importing_the_command_line_does_not_import_onnx():
    code = "import sys, tmexport, tmexport.cli, tmexport.onnx; print([m for m in sys.modules if m.split('.')[0] in ('onnx', 'onnxruntime', 'torch', 'numba')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_generate_is_the_peers_greedy_continuation(tied, files, tmp_path):
    """Twelve tokens, each the most likely one by transformers given all before it."""
    from tokenizers import Tokenizer

    prompt = "import numpy as np"
    tokenizer = Tokenizer.from_file(str(tied.tokenizer))
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    peer, wanted = peer_model(tied), list(ids)
    with torch.no_grad():
        for _ in range(12):
            wanted.append(int(peer(torch.tensor([wanted]), use_cache=False).logits[0, -1].argmax()))
    command = [sys.executable, "-m", "tmexport.onnx.generate", str(files["portable", "f32"]), "--prompt", prompt, "-n", "12"]  # fmt: skip
    report = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert report["tokens"] == wanted[len(ids) :]
    assert report["text"] == tokenizer.decode(report["tokens"])
    plain = CliRunner().invoke(generate_command, command[3:])
    assert plain.stdout == prompt + report["text"] + "\n"
    assert "tokens/s" in plain.stderr


def test_generate_with_kernels_has_the_bits_of_runtime_ref(tied, files, tmp_path):
    run("gguf", tied.path, tmp_path / "m.gguf", "--embedding-type", "q8_0")
    options = ["--prompt", "def exact", "-n", "6", "--threads", "1", "--json"]
    ours = CliRunner().invoke(generate_command, [str(files["custom", "q8"]), "--kernels", *options])
    theirs = CliRunner().invoke(generate_command, [str(tmp_path / "m.gguf"), "--profile", "exact", *options])
    ours, theirs = json.loads(ours.stdout), json.loads(theirs.stdout)
    assert ours["logits_sha256"] == theirs["logits_sha256"]
    assert ours["tokens"] == theirs["tokens"]


def test_generate_errors_are_one_line(files, tmp_path):
    def fails(*args):
        command = [sys.executable, "-m", "tmexport.onnx.generate", *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.stdout, len(result.stderr.splitlines())) == ("", 1), result.stderr
        return result.returncode, result.stderr

    code, text = fails(tmp_path / "none.onnx", "--prompt", "x")
    assert (code, "no such file" in text) == (2, True)
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    code, text = fails(tmp_path / "m.onnx", "--prompt", "x")
    assert (code, "name one with --tokenizer" in text) == (1, True)
    tokenizer = files["ort", "q8"].with_name("ort_q8.tokenizer.json")
    code, text = fails(tmp_path / "m.onnx", "--prompt", "x", "--tokenizer", tokenizer)
    assert (code, "cannot load it" in text) == (1, True)
    assert fails(files["ort", "q8"], "--prompt", "")[0] == 2
    assert fails(files["ort", "q8"], "--prompt", "x", "--temperature", "-1")[0] == 2


def test_reading_a_dense_checkpoint_that_is_ternary(tied, tmp_path):
    """A checkpoint whose weights were dequantised gives the same file as the ternary one."""
    dense = {name: np.array(tied.dense(name)) for name in tied.names}
    write_checkpoint(tmp_path / "ckpt", TIED, dense)
    assert open_checkpoint(tmp_path / "ckpt").group_size is None
    assert run("onnx", tmp_path / "ckpt", tmp_path / "a.onnx").exit_code == 0
    assert run("onnx", tied.path, tmp_path / "b.onnx").exit_code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert OrtModel.load(tmp_path / "a.onnx").info.group_size == 64
