"""The container: gguf's own reader sees what we wrote, and ours reads what gguf's writer wrote."""

import gguf
import numpy as np
import pytest

from tests.models import SMALL, write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import GGUFError
from tmexport.gguf.export import plan_export
from tmexport.gguf.names import config_from_metadata, group_size_of, tensor_shapes
from tmexport.gguf.reader import open_gguf
from tmexport.types import decode_values


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    checkpoint = open_checkpoint(write_small(folder / "ckpt", group_size=256))
    path = folder / "small.gguf"
    plan_export(checkpoint, "tq2_0", "q8_0").write(path, lambda tensor: None)
    return checkpoint, path


def test_gguf_reads_the_keys_and_shapes(exported):
    checkpoint, path = exported
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "mamba2"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_TQ2_0
    assert [
        fields[f"mamba2.{key}"] for key in ("embedding_length", "block_count", "ssm.inner_size", "ssm.state_size")
    ] == [256, 2, 512, 64]
    assert [fields[f"mamba2.ssm.{key}"] for key in ("conv_kernel", "time_step_rank", "group_count")] == [4, 8, 1]
    assert fields["mamba2.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.tokens"]) == SMALL.vocab_size
    shapes = {tensor.name: tuple(int(d) for d in tensor.shape[::-1]) for tensor in reader.tensors}
    expected = tensor_shapes(SMALL)
    assert {name: np.trim_zeros(shape, "b") for name, shape in shapes.items()} == expected
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    out_proj = gguf.quants.dequantize(by_name["blk.1.ssm_out.weight"].data, gguf.GGMLQuantizationType.TQ2_0)
    assert np.array_equal(out_proj, checkpoint.dense("backbone.layers.1.mixer.out_proj.weight"))
    assert np.array_equal(
        by_name["blk.0.ssm_a"].data.ravel(),
        -np.exp(checkpoint.dense("backbone.layers.0.mixer.A_log").astype(np.float64)).astype(np.float32),
    )


def test_our_reader_agrees_with_gguf_on_every_tensor(exported):
    _, path = exported
    ours, reader = open_gguf(path), gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == list(ours.tensors)
    for tensor in reader.tensors:
        info = ours.tensors[tensor.name]
        assert (tensor.data_offset, tensor.n_bytes, tensor.tensor_type) == (info.offset, info.nbytes, info.type)
        values = decode_values(ours.blocks(tensor.name), info.type, info.shape[-1])
        assert np.array_equal(values.ravel(), gguf.quants.dequantize(tensor.data, tensor.tensor_type).ravel())
    assert config_from_metadata(ours).to_hf() == SMALL.to_hf() | {"bos_token_id": 0, "eos_token_id": 0}
    assert group_size_of(ours) == 256


def test_a_file_from_ggufs_own_writer(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "mamba2")
    writer.add_uint64("a.u64", 2**40)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.strings", ["x", "é"])
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("t", values.astype(np.float16))
    writer.add_tensor(
        "u", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "w.gguf")
    assert file.metadata == {
        "general.architecture": "mamba2", "a.u64": 2**40, "a.f64": 0.1, "a.bool": True, "a.ints": [1, -2, 3], "a.strings": ["x", "é"],
    }  # fmt: skip
    assert np.array_equal(decode_values(file.blocks("t"), file.tensors["t"].type, 32), values)
    assert file.tensors["u"].shape == (2, 32)
    with pytest.raises(GGUFError, match="has no tensor v"):
        file.blocks("v")


@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_the_group_size_of_a_strangers_q2_0_is_inferred(tmp_path, group_size):
    checkpoint = open_checkpoint(write_small(tmp_path / "ckpt", group_size=group_size))
    plan = plan_export(checkpoint, "q2_0")
    del plan.metadata["tmexport.group_size"]
    plan.write(tmp_path / "m.gguf", lambda tensor: None)
    assert group_size_of(open_gguf(tmp_path / "m.gguf")) == group_size


def test_the_same_checkpoint_gives_the_same_bytes(exported, tmp_path):
    checkpoint, path = exported
    plan_export(checkpoint, "tq2_0", "q8_0").write(tmp_path / "again.gguf", lambda tensor: None)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()
