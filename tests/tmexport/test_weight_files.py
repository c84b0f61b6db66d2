"""Checkpoints as they lie about: names that trainers wrap, views, nested and old archives, byte order marks, and what is no checkpoint."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import invoke
from tests.models import SMALL, random_tensors, write_small, write_state_spaces
from tmexport.checkpoint import open_checkpoint
from tmexport.cli import cli
from tmexport.errors import CheckpointError, ConfigError
from tmexport.files import what_it_is
from tmexport.model import mamba2_model

NAMES = {
    "torch.compile": lambda n: "_orig_mod." + n,
    "data parallel": lambda n: "module." + n,
    "both": lambda n: "module._orig_mod." + n,
    "compiled layers": lambda n: n.replace("layers.0.", "layers.0._orig_mod.").replace("mixer.", "mixer._orig_mod."),
    "FSDP": lambda n: "_fsdp_wrapped_module." + n.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "PEFT": lambda n: "base_model.model." + n,
    "Lightning": lambda n: "model." + n,
    "another class's root": lambda n: n.replace("backbone.", "model."),
    "no root (Mamba2Model)": lambda n: n.replace("backbone.", ""),
    "state-spaces": lambda n: n.replace("embeddings", "embedding"),
    "a trainer's own": lambda n: "student.net." + n,
    "Fabric": lambda n: "_forward_module.module." + n,
}  # fmt: skip


@pytest.mark.parametrize("group_size", [None, 64], ids=["dense", "ternary"])
@pytest.mark.parametrize("wrapped", NAMES)
def test_names_as_trainers_write_them(tmp_path, wrapped, group_size):
    write_small(tmp_path, group_size=group_size)
    expected = open_checkpoint(tmp_path)
    expected = {name: expected.dense(name) for name in expected.names}
    state = load_file(tmp_path / "model.safetensors")
    save_file({NAMES[wrapped](name): value for name, value in state.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert all(np.array_equal(checkpoint.dense(name), value) for name, value in expected.items())


def test_names_in_shards(tmp_path):
    write_small(tmp_path)
    state = {"_orig_mod." + n: v for n, v in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        save_file({name: value for name, value in state.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    checkpoint, tensors = open_checkpoint(tmp_path), random_tensors(SMALL)
    assert all(np.array_equal(checkpoint.dense(name), tensors[name]) for name in checkpoint.names)


def test_two_names_of_one_tensor_are_refused(tmp_path):
    write_small(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["module.backbone.norm_f.weight"] = state["backbone.norm_f.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm_f.weight and .*norm_f.weight are both backbone.norm_f.weight"):
        open_checkpoint(tmp_path)


def _views(state):
    """Every matrix as a transposed, a sliced or a strided view; one vector expanded."""
    changed = {}
    for number, (name, value) in enumerate(state.items()):
        if value.ndim == 1:
            changed[name] = torch.cat([torch.full((3,), 9.0), value])[3:]
            continue
        wide = torch.full((value.shape[0], *value.shape[1:-1], 2 * value.shape[-1]), 9.0)
        wide[..., ::2] = value
        narrow = torch.full((*value.shape[:-1], value.shape[-1] + 5), 9.0)
        narrow[..., 2:-3] = value
        transposed = value.transpose(0, -1).contiguous().transpose(0, -1)
        changed[name] = (wide[..., ::2], narrow[..., 2:-3], transposed)[number % 3]
        assert torch.equal(changed[name], value)
    changed["backbone.layers.0.mixer.D"] = torch.tensor([1.5]).expand(len(state["backbone.layers.0.mixer.D"]))
    return changed


SAVED = {
    "as it is": lambda s: s,
    "parameters": lambda s: {n: torch.nn.Parameter(v) for n, v in s.items()},
    "Lightning": lambda s: {"state_dict": {"model." + n: v for n, v in s.items()}, "epoch": 3, "optimizer_states": [{"x": torch.zeros(2)}]},
    "a trainer's": lambda s: {"model": s, "step": 7, "best": 1.5},
    "DeepSpeed": lambda s: {"module": s, "global_steps": 7},
    "torch's tutorial": lambda s: {"model_state_dict": s, "loss": 0.5},
    "views": _views,
    "beside no value": lambda s: s | {"_extra_state": None},
    "half": lambda s: {n: v.to(torch.bfloat16) for n, v in s.items()},
    "parameters with attributes": lambda s: {n: _marked(torch.nn.Parameter(v)) for n, v in s.items()},
    "tensors with attributes": lambda s: {n: _marked(v) for n, v in s.items()},
    "a module's state dict": lambda s: _module(s).state_dict(),
    "beside all sorts": lambda s: {"model": s, "rest": [torch.float16, torch.Size([2]), torch.device("cpu"), 1j, {1}, b"x", bytearray(b"y"), Counter("a"), torch.ones(3, dtype=torch.int16), torch.eye(2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)]},
}  # fmt: skip


def _marked(tensor):
    tensor._no_weight_decay = True  # as state-spaces marks A_log and D
    return tensor


def _module(state):
    root = torch.nn.Module()
    for name, value in state.items():
        *path, last = name.split(".")
        module = root
        for word in path:
            if not hasattr(module, word):
                module.add_module(word, torch.nn.Module())
            module = getattr(module, word)
        module.register_parameter(last, torch.nn.Parameter(value))
    return root


@pytest.mark.parametrize("old_form", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("how", SAVED)
def test_whatever_torch_saves(tmp_path, how, old_form):
    tensors = random_tensors(SMALL)
    write_state_spaces(tmp_path, SMALL, tensors, SMALL.vocab_size)
    state = SAVED[how]({name: torch.from_numpy(value) for name, value in tensors.items()})
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_form)
    checkpoint = open_checkpoint(tmp_path)
    expected = _views({n: torch.from_numpy(v) for n, v in tensors.items()}) if how == "views" else None
    for name in checkpoint.names:
        value = torch.from_numpy(tensors[name]) if expected is None else expected[name]
        value = value.to(torch.bfloat16).float() if how == "half" else value
        assert np.array_equal(checkpoint.dense(name), value.numpy()), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_and_without_torch(tmp_path, protocol):
    """A board has no torch: only the form before 1.6 needs it."""
    tensors = random_tensors(SMALL)
    write_state_spaces(tmp_path, SMALL, tensors, SMALL.vocab_size)
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from tmexport.checkpoint import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1]); print(sum(float(c.dense(n).sum(dtype='f8')) for n in c.names))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(sum(value.sum(dtype="f8") for value in tensors.values()), rel=1e-9)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "has torch's form before 1.6, which needs torch; run `pip install 'tmexport[qat]'`" in done.stderr


def test_a_tied_head_in_an_old_archive_is_compared(tmp_path):
    config = mamba2_model(256, 1, 512, d_state=64)
    tensors = random_tensors(config)
    write_state_spaces(tmp_path, config, tensors, config.vocab_size)
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    state["lm_head.weight"] = state["backbone.embeddings.weight"] + 1
    for old_form in (True, False):
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_form)
        with pytest.raises(CheckpointError, match="lm_head.weight differs"):
            open_checkpoint(tmp_path)


def test_byte_order_marks_in_json(tmp_path):
    write_small(tmp_path)
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_checkpoint(tmp_path).config == SMALL
    path.write_bytes(path.read_text(encoding="utf-8-sig").encode("utf-16"))
    with pytest.raises(ConfigError, match=r"config.json: .*is UTF-16 text; save it as UTF-8"):
        open_checkpoint(tmp_path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269\n"
PAGE = b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"])  # fmt: skip
@pytest.mark.parametrize(
    ("content", "message"),
    [(POINTER, "is a git-lfs pointer.*git lfs pull"), (PAGE, "is a web page"), (b"GGUF\3\0\0\0", "is a GGUF file")],
    ids=["git-lfs", "page", "gguf"],
)
def test_files_that_are_something_else(tmp_path, name, content, message):
    write_small(tmp_path)
    if name != "config.json":
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=f"{name}: .*{message}"):
        open_checkpoint(tmp_path)


def test_a_safetensors_header_whose_length_begins_as_json_does(tmp_path):
    """123 is the byte of "{"."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((123).to_bytes(8, "little") + b'{"a": 1}'.ljust(123))
    assert what_it_is(path) is None
    path.write_bytes(b'{"error": "not found"}')
    assert "is a JSON text" in (what_it_is(path) or "")


def test_a_lora_adapter_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/mamba2-130m"}))
    save_file({"base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight": torch.zeros(8, 4)}, tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(ConfigError, match="is a LoRA adapter.*merge_and_unload"):
        open_checkpoint(tmp_path)
    write_small(tmp_path / "ckpt")
    (tmp_path / "config.json").write_bytes((tmp_path / "ckpt" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="holds no weights.*is a LoRA adapter"):
        open_checkpoint(tmp_path)
    state = load_file(tmp_path / "ckpt" / "model.safetensors")
    state["base_model.model.backbone.layers.0.mixer.in_proj.lora_A.default.weight"] = torch.zeros(8, 256)
    save_file(state, tmp_path / "ckpt" / "model.safetensors")
    with pytest.raises(CheckpointError, match="lora_A.default.weight: it is a LoRA adapter"):
        open_checkpoint(tmp_path / "ckpt")


@pytest.mark.parametrize("words", ["base_layer.weight", "modules_to_save.default.weight", "lora_magnitude_vector"])
def test_an_adapter_that_was_not_merged_is_named(tmp_path, words):
    write_small(tmp_path)
    name = "backbone.layers.0.mixer.in_proj."
    state = {n.replace(name + "weight", name + words): v for n, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a LoRA adapter"):
        open_checkpoint(tmp_path)


def test_two_models_in_one_file_are_not_guessed_between(tmp_path):
    write_small(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"{of}.{n}": v.clone() for of in ("student", "teacher") for n, v in state.items()}, tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match=r"embeddings.weight is missing.*\(found student.backbone.embeddings"):
        open_checkpoint(tmp_path)


def test_an_untied_model_without_a_head(tmp_path):
    write_small(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight is missing.*or tie_word_embeddings true"):
        open_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(tmp_path).config.tie_embeddings


@pytest.mark.parametrize("old_form", [False, True], ids=["zip", "before 1.6"])
def test_a_negated_view_is_not_read_with_the_wrong_sign(tmp_path, old_form):
    """torch stores the values before the sign, and a flag."""
    tensors = random_tensors(SMALL)
    write_state_spaces(tmp_path, SMALL, tensors, SMALL.vocab_size)
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    state["backbone.norm_f.weight"] = torch._neg_view(-state["backbone.norm_f.weight"])
    assert torch.equal(state["backbone.norm_f.weight"], torch.from_numpy(tensors["backbone.norm_f.weight"]))
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_form)
    if old_form:
        assert np.array_equal(open_checkpoint(tmp_path).dense("backbone.norm_f.weight"), tensors["backbone.norm_f.weight"])  # fmt: skip
        return
    with pytest.raises(CheckpointError, match="a view with the flag neg; save it again with .resolve_neg()"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["backbone.layers.1.mixer.in_proj.weight", "backbone.layers.0.mixer.dt_bias", "lm_head.weight"])  # fmt: skip
def test_weights_that_are_no_numbers(tmp_path, name, value):
    """A training that diverged; rounding would make codes of it without a word."""
    write_small(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state[name].view(-1)[-1] = value
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: holds NaN or infinite values"):
        open_checkpoint(tmp_path).dense(name)
    done = invoke(cli, "gguf", tmp_path, tmp_path / "m.gguf", "--ptq", "rtn")
    assert (done.exit_code, (tmp_path / "m.gguf").exists()) == (1, False)
    assert done.stderr.splitlines()[-1] == f"error: {name}: holds NaN or infinite values; the checkpoint is damaged"


def test_weights_under_another_name_are_named(tmp_path):
    write_small(tmp_path)
    for name in ("consolidated.safetensors", "model.safetensors.gz", "model.safetensors.incomplete"):
        next(tmp_path.glob("*safetensors*")).rename(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"holds no weights.*found {name}"):
            open_checkpoint(tmp_path)
    (tmp_path / name).rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="found the shard model-00001-of.*not the index.*, model.safetensors.index.json"):  # fmt: skip
        open_checkpoint(tmp_path)


OTHER_FORMS = {
    "gzip": (lambda data: gzip.compress(data, 1), "is compressed; unpack it .gunzip"),
    "bzip2": (lambda data: bz2.compress(data[:999]), "is compressed; unpack it .bunzip2"),
    "xz": (lambda data: lzma.compress(data[:999]), "is compressed; unpack it .unxz"),
    "an answer": (lambda data: b'{"error": "Repository not found"}', "is a JSON text"),
    "torch's": (lambda data: b"PK\3\4" + data, "is a zip archive"),
}


@pytest.mark.parametrize("how", OTHER_FORMS)
def test_what_lies_under_the_weights_name_is_said(tmp_path, how):
    change, said = OTHER_FORMS[how]
    write_small(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(change(data))
    with pytest.raises(CheckpointError, match=f"model.safetensors: {said}"):
        open_checkpoint(tmp_path)
    path.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: is a safetensors file; name it model.safetensors"):
        open_checkpoint(tmp_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ConfigError, match="config.json: cannot be read as JSON: is compressed"):
        open_checkpoint(tmp_path)


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="model.gguf: is a file; expected a checkpoint folder"):
        open_checkpoint(tmp_path / "model.gguf")
