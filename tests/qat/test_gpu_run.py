"""The GPU run's dry run on this CPU: the same command with tiny shapes; what it cuts and packs against what was there."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from qat.model import LanguageModel
from scripts.machines.gpu import run
from scripts.machines.gpu.parts import join, pack_checkpoint, restore_checkpoint, shards, split
from tests.commands import invoke
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import TmexportError
from tmexport.gguf.export import plan_export
from tmexport.model import llama_model
from tmexport.safetensors_io import index_safetensors


@pytest.mark.slow
def test_dry_run(tokenizer_path, tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(llama_model(64, 2, 300, 2, 128, 1, tie_embeddings=True, eos_token_id=0))
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "teacher", model.config, tensors, tokenizer_path)
    (tmp_path / "teacher" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    plan_export(open_checkpoint(tmp_path / "teacher"), "f16").write(tmp_path / "t.gguf", lambda tensor: None)
    assert split(tmp_path / "t.gguf", tmp_path / "parts", 70_000) > 1
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[align]\nsteps = 3\nrefit_tokens = 64\n[distill]\nsteps = 2\n[ternary]\nsteps = 2\n")
    (tmp_path / "prompts.jsonl").write_text('{"text": "Who?"}\n{"text": "What is the Union?"}\n')
    args = ["--parts", tmp_path / "parts", "--work", tmp_path / "work", "--minutes", 3, "--seconds", 0.05]
    args += ["--keep", "0,", "--tiny", "--recipe", recipe, "--prompts", tmp_path / "prompts.jsonl"]
    parts = ["--only", "checks", "--only", "probe", "--only", "speeds", "--only", "chain", "--only", "controls"]
    result = invoke(run.main, *args, *parts, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert log == json.loads(result.stdout)
    assert log["checks"]["chunked fp32, forward"] < 1e-4 < log["checks"]["chunked bf16, forward"] < 3e-2
    assert log["checks"]["model fp32"] == 0.0  # here the device is the CPU
    assert all(log[f"{name}, chunked"]["tokens_per_second"] > 0 for name in run.RECIPES)
    assert all(log[f"probe {stage}, chunked"]["tokens_per_second"] > 0 for stage in ("align", "distill", "ternary"))
    stages = ("align", "distill", "mixers", "ternary", "control-ternary", "control-text")
    assert [log[stage]["stopped_by"] for stage in stages] == ["steps"] * 6
    assert log["judged"] == [0] * 7
    judged = json.loads((tmp_path / "out" / "judged-ternary.json").read_text())["ternary"]
    assert judged["windows"] == pytest.approx(judged["documents"], rel=0.02)
    assert len(judged["answers"]) == 50
    assert json.loads((tmp_path / "out" / "judged-mixers.json").read_text()).keys() == {"mixers"}
    kinds = {role: form.kind for role, form in open_checkpoint(tmp_path / "work" / "mixers").coded.items()}
    assert kinds["in_proj"] == kinds["out_proj"] == "ternary"
    assert kinds["gate_proj"] == kinds["down_proj"] == kinds["q_proj"] == "int4"
    texts = [json.loads(line)["text"] for line in (tmp_path / "work" / "written.jsonl").read_text().splitlines()]
    assert len(texts) == log["written"]["texts"]
    assert all("Who?" in text or "Union" in text for text in texts)
    packed = {}
    for name in log["ternary files"]:
        packed |= load_file(tmp_path / "work" / "packed" / name)
    stored = index_safetensors(tmp_path / "work" / "ternary" / "model.safetensors")
    assert set(stored) - set(packed) == {"model.embed_tokens.weight"}
    codes = [name for name in packed if name.endswith(".codes")]
    assert codes
    assert all(np.array_equal(packed[name], stored[name].read()) for name in codes)
    (teacher,) = (tmp_path / "work" / "cache").glob("teacher-*")  # out of the GGUF, so its embedding is fp16's
    restore_checkpoint(tmp_path / "work" / "packed", "mixers", teacher, tmp_path / "again")
    there, here = (open_checkpoint(folder) for folder in (tmp_path / "work" / "mixers", tmp_path / "again"))
    for name in there.names:
        tolerance = 0 if there.kind(name) or there.dense(name).ndim < 2 else 1e-3
        assert np.allclose(there.dense(name), here.dense(name), rtol=tolerance, atol=0), name
    again = invoke(run.main, *args, "--out", tmp_path / "more", "--collect", "distill")
    assert again.exit_code == 0, again.output
    assert (tmp_path / "more" / "distill-0.safetensors").is_file()


def test_a_wrong_device_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "scan_errors", lambda device, **shape: {"chunked bf16, forward": 0.5})
    with pytest.raises(TmexportError, match="differs from the CPU by 0.5; expected less than 0.03"):
        run.check(torch.device("cpu"), run.Log(tmp_path, 1.0), True)


def test_parts_come_together_and_a_missing_one_is_noticed(tmp_path):
    content = bytes(range(256)) * 5
    (tmp_path / "file").write_bytes(content)
    assert split(tmp_path / "file", tmp_path / "parts", 500) == 3
    assert join(tmp_path / "parts", tmp_path / "again").read_bytes() == content
    (tmp_path / "parts" / "1" / "part").unlink()
    with pytest.raises(TmexportError, match=r"has the parts \[0, 2\]; expected 0, 1, 2"):
        join(tmp_path / "parts", tmp_path / "again")


def test_files_are_no_larger_than_asked():
    tensors = {"a": np.arange(10.0), "b": np.arange(100.0).reshape(20, 5), "c": np.arange(3.0)}
    found = list(shards(tensors, 300))
    assert all(sum(tensor.nbytes for tensor in part.values()) <= 300 for part in found)
    rows = np.concatenate([part[f"b:{number}"] for number in range(3) for part in found if f"b:{number}" in part])
    assert np.array_equal(rows, tensors["b"])


def test_what_is_packed_of_a_dense_checkpoint_is_fp16(tokenizer_path, tmp_path):
    torch.manual_seed(0)
    model = LanguageModel(llama_model(64, 1, 300, 2, 128, 1, tie_embeddings=True, eos_token_id=0))
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "dense", model.config, tensors, tokenizer_path)
    (path,) = pack_checkpoint(tmp_path / "dense", tmp_path)
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.ndim == 2} == {np.dtype(np.float16)}
    assert {tensor.dtype for tensor in load_file(path).values() if tensor.ndim == 1} == {np.dtype(np.float32)}
    with pytest.raises(TmexportError, match=r"has no other-0.safetensors"):
        restore_checkpoint(tmp_path, "other", tmp_path / "dense", tmp_path / "out")
