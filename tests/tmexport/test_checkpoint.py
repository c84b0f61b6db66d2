"""Checkpoint folders: the dialects agree, shards and dtypes are read, and what is wrong is named."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.models import SMALL, random_tensors, random_ternary, ternary_tensors, write_small, write_state_spaces
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError
from tmexport.model import mamba2_model


def test_a_folder_saved_by_transformers_sharded_and_in_bfloat16(tmp_path):
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SMALL.to_hf())).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == SMALL
    expected = model.state_dict()
    assert set(checkpoint.names) == set(expected)
    for name in checkpoint.names:
        assert np.array_equal(checkpoint.dense(name), expected[name].float().numpy()), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_state_spaces_dialect(tmp_path, tied):
    config = mamba2_model(256, 2, 512, d_state=64, n_groups=2, tie_embeddings=tied)
    tensors = random_tensors(config)
    write_state_spaces(tmp_path, config, tensors, vocab_size=500)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert all(np.array_equal(checkpoint.dense(name), tensors[name]) for name in checkpoint.names)


def test_the_ternary_form_is_lossless(tmp_path):
    tensors = ternary_tensors(SMALL, 128)
    write_checkpoint(tmp_path, SMALL, tensors)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.group_size == 128
    for name in SMALL.projections:
        read = checkpoint.codes(name)
        assert np.array_equal(read.codes, tensors[name].codes)
        assert np.array_equal(read.scales.view(np.uint16), tensors[name].scales.view(np.uint16))


def test_a_dequantised_ternary_model_in_fp16_is_recognised(tmp_path):
    tensors = ternary_tensors(SMALL, 64)
    dense = {name: t if isinstance(t, np.ndarray) else t.dense().astype(np.float16) for name, t in tensors.items()}
    write_checkpoint(tmp_path, SMALL, dense)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.group_size is None
    name = SMALL.projections[0]
    assert checkpoint.codes(name).group_size == 64
    assert np.array_equal(checkpoint.codes(name).codes, tensors[name].codes)


def _rewrite(folder, change):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("backbone.norm_f.weight"), "backbone.norm_f.weight is missing"),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), "holds extra.weight"),
        (lambda s: s.update({"backbone.norm_f.weight": torch.zeros(3)}), r"backbone.norm_f.weight is F32 \[3\]"),
        (lambda s: s.update({"backbone.norm_f.weight": torch.zeros(256, dtype=torch.int64)}), "is I64"),
    ],
)
def test_a_folder_that_is_not_the_model_it_says(tmp_path, change, message):
    write_small(tmp_path)
    _rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    config = mamba2_model(256, 1, 512, d_state=64)
    write_small(tmp_path, config)
    _rewrite(tmp_path, lambda s: s.update({"lm_head.weight": s["backbone.embeddings.weight"] + 1}))
    with pytest.raises(CheckpointError, match="lm_head.weight differs"):
        open_checkpoint(tmp_path)


def test_an_unknown_version_is_refused(tmp_path):
    write_small(tmp_path, group_size=256)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="version 2; this release reads 1"):
        open_checkpoint(tmp_path)


def test_writing_refuses_mixed_groups_and_wrong_shapes(tmp_path):
    tensors = ternary_tensors(SMALL, 256)
    first, second = SMALL.projections[:2]
    with pytest.raises(
        CheckpointError, match="in_proj are ternary in groups of 256 and ternary in groups of 64; expected one form"
    ):
        write_checkpoint(tmp_path, SMALL, tensors | {first: random_ternary(*tensors[first].shape, 64)})
    with pytest.raises(CheckpointError, match=f"{second}: found nothing"):
        write_checkpoint(tmp_path, SMALL, {name: t for name, t in tensors.items() if name != second})


def test_what_lies_beside_a_tokenizer_goes_with_it(tmp_path):
    write_small(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    source = open_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", source.config, {n: source.dense(n) for n in source.names}, source.tokenizer)
    assert (tmp_path / "b" / "generation_config.json").read_text() == '{"eos_token_id": [0, 5]}'
    assert (tmp_path / "b" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "b" / "tokenizer_config.json").exists()
