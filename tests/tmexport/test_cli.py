"""The commands as a user types them: what they print, what they refuse, and that nothing is left behind."""

import json

import numpy as np
import pytest

from tests.commands import invoke
from tests.models import SMALL, random_tensors, ternary_tensors, train_tokenizer, write_small, write_state_spaces
from tmexport.checkpoint import write_checkpoint
from tmexport.cli import cli
from tmexport.gguf.reader import open_gguf
from tmexport.model import mamba2_model
from tmexport.safetensors_io import index_safetensors


def run(*args):
    return invoke(cli, *args)


@pytest.fixture
def ternary(tmp_path):
    return write_small(tmp_path / "ternary", group_size=256)


@pytest.mark.parametrize(("group_size", "kind"), [(256, "TQ1_0"), (128, "Q2_0"), (64, "Q2_0")])
def test_auto_is_the_smallest_exact_type(tmp_path, group_size, kind):
    source = write_small(tmp_path / "ckpt", group_size=group_size)
    result = run("gguf", source, tmp_path / "m.gguf", "--json")
    assert result.exit_code == 0, result.output
    assert (json.loads(result.stdout)["type"], json.loads(result.stdout)["group_size"]) == (kind, group_size)
    assert run("verify", source, tmp_path / "m.gguf").exit_code == 0


def test_auto_sees_that_groups_of_64_agree(tmp_path):
    tensors = ternary_tensors(SMALL, 256)
    finer = {
        n: t if isinstance(t, np.ndarray) else type(t)(t.codes, np.repeat(t.scales, 4, axis=1), 64)
        for n, t in tensors.items()
    }
    write_checkpoint(tmp_path / "ckpt", SMALL, finer, train_tokenizer(tmp_path / "tokenizer.json"))
    result = run("gguf", tmp_path / "ckpt", tmp_path / "m.gguf")
    assert "TQ1_0" in result.stdout
    assert run("verify", tmp_path / "ckpt", tmp_path / "m.gguf").exit_code == 0


def test_the_listing_adds_up(ternary, tmp_path):
    result = run("gguf", ternary, tmp_path / "m.gguf", "--embedding-type", "q8_0")
    lines = result.stdout.splitlines()
    listed = sum(int(line.split()[-2].replace(",", "")) for line in lines if line.endswith("bytes"))
    size = (tmp_path / "m.gguf").stat().st_size
    metadata = open_gguf(tmp_path / "m.gguf")
    first = min(info.offset for info in metadata.tensors.values())
    assert 0 <= size - first - listed < 32 * len(metadata.tensors)  # the rest is alignment
    assert lines[-1].startswith(f"{tmp_path / 'm.gguf'}: {size / 1e6:.1f} MB")


def test_dry_run_writes_nothing_and_says_the_size_it_would_be(ternary, tmp_path):
    planned = json.loads(run("gguf", ternary, tmp_path / "m.gguf", "--dry-run", "--json").stdout)
    assert not (tmp_path / "m.gguf").exists()
    run("gguf", ternary, tmp_path / "m.gguf")
    assert planned["bytes"] == (tmp_path / "m.gguf").stat().st_size


def test_a_float_checkpoint_is_refused_unless_told_otherwise(tmp_path):
    source = write_small(tmp_path / "fp")
    for kind in ("auto", "tq2_0", "q2_0"):
        result = run("gguf", source, tmp_path / "m.gguf", "--type", kind)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert "backbone.layers.0.mixer.in_proj.weight: row 0, group 0" in result.stderr
        assert "--ptq rtn" in result.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fp"]
    assert run("gguf", source, tmp_path / "m.gguf", "--type", "f16").exit_code == 0
    assert run("verify", source, tmp_path / "m.gguf").exit_code == 0
    result = run("gguf", source, tmp_path / "m.gguf", "--ptq", "rtn")
    assert result.exit_code == 0
    assert "quality will be lost" in result.stderr
    result = run("verify", source, tmp_path / "m.gguf")
    assert result.exit_code == 1
    assert "blk.0.ssm_in.weight" in result.stderr


def test_verify_names_the_first_difference(ternary, tmp_path):
    path = tmp_path / "m.gguf"
    run("gguf", ternary, path, "--type", "tq2_0")
    file = open_gguf(path)
    info = file.tensors["blk.1.ssm_out.weight"]
    data = bytearray(path.read_bytes())
    row = info.offset + 5 * info.type.row_bytes(512) + 66  # row 5, block 1: elements 256, 288, 320, 352
    data[row] ^= 0b01 if data[row] & 3 != 2 else 0b10
    path.write_bytes(data)
    result = run("verify", ternary, path)
    assert result.exit_code == 1
    assert "blk.1.ssm_out.weight, row 5, group 1: expected code" in result.stderr
    assert "in column 256" in result.stderr
    report = json.loads(run("verify", ternary, path, "--json").stdout)
    assert (report["equal"], report["difference"]["row"]) == (False, 5)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("token_embd.weight", "f16"),
        ("token_embd.weight", "q8_0"),
        ("token_embd.weight", "q4_0"),
        ("blk.0.ssm_a", "f16"),
        ("blk.0.ssm_dt.bias", "f16"),
    ],
)
def test_verify_sees_a_change_in_any_other_tensor(ternary, tmp_path, tensor, kind):
    path = tmp_path / "m.gguf"
    run("gguf", ternary, path, "--embedding-type", kind)
    assert run("verify", ternary, path).exit_code == 0
    info = open_gguf(path).tensors[tensor]
    data = bytearray(path.read_bytes())
    data[info.offset + 3] ^= 0x40
    path.write_bytes(data)
    result = run("verify", ternary, path)
    assert result.exit_code == 1
    assert tensor in result.stderr


def test_verify_sees_another_models_tokenizer(ternary, tmp_path):
    run("gguf", ternary, tmp_path / "m.gguf")
    train_tokenizer(ternary / "tokenizer.json", size=400)
    result = run("verify", ternary, tmp_path / "m.gguf")
    assert result.exit_code == 1
    assert "tokenizer: expected the text of" in result.stderr


def test_inspect_counts_zeros_exactly(ternary, tmp_path):
    run("gguf", ternary, tmp_path / "m.gguf", "--type", "tq1_0")
    stored = index_safetensors(ternary / "model.safetensors")
    for target in (ternary, tmp_path / "m.gguf"):
        summary = json.loads(run("inspect", target, "--json").stdout)
        assert summary["config"]["d_model"] == SMALL.d_model
        assert summary["group_size"] == 256
        ratios = [tensor["zero_ratio"] for tensor in summary["tensors"] if tensor["zero_ratio"] is not None]
        for ratio, name in zip(ratios, SMALL.projections, strict=True):
            packed = stored[name + ".codes"].read()  # the four codes of a byte, counted straight from the bytes
            zeros = sum(int(((packed >> shift & 3) == 1).sum()) for shift in (0, 2, 4, 6))
            assert ratio == pytest.approx(zeros / (4 * packed.size), abs=1e-12)
        assert run("inspect", target).exit_code == 0


def test_the_size_of_the_1_3b_shape(tmp_path):
    """Headers alone: the weights of this checkpoint are a hole in a sparse file, and a dry run does not read them.

    The published peer stores the same model in 744 MB (arXiv 2606.18114). What is expected here is counted by hand:
    bits a weight from llama.cpp's block sizes, and 32 bits for what its kernels only accept as F32.
    """
    config = mamba2_model(d_model=2048, n_layer=48, vocab_size=50288)
    _write_sparse_ternary(tmp_path, config)
    projections = 48 * (8512 * 2048 + 2048 * 4096)
    embedding = 50288 * 2048 * 34 // 32
    small = 4 * (48 * (4352 * 5 + 3 * 64 + 4096 + 2048) + 2048)
    for kind, block_bytes, megabytes in (("tq1_0", 54, 377), ("tq2_0", 66, 435)):
        result = run("gguf", tmp_path, "--dry-run", "--json", "--type", kind, "--embedding-type", "q8_0")
        assert result.exit_code == 0, result.output
        size = json.loads(result.stdout)["bytes"]
        header = size - (projections // 256 * block_bytes + embedding + small)
        assert 0 < header < 40_000
        assert size < megabytes * 1e6


def _write_sparse_ternary(folder, config):
    from tmexport.checkpoint import expected_shapes

    header, offset = {}, 0
    for name, shape in expected_shapes(config).items():
        parts = {name: ("F32", shape, 4)}
        if "_proj" in name:
            parts = {
                name + ".codes": ("U8", (shape[0], shape[1] // 4), 1),
                name + ".scales": ("F16", (shape[0], shape[1] // 256), 2),
            }
        for part, (dtype, part_shape, width) in parts.items():
            size = int(np.prod(part_shape)) * width
            header[part] = {"dtype": dtype, "shape": part_shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    raw = config.to_hf() | {"quantization_config": {"quant_method": "ternary", "group_size": 256, "version": 1}}
    (folder / "config.json").write_text(json.dumps(raw))


def test_both_dialects_export_the_same_tensors_at_the_130m_shape(tmp_path):
    config = mamba2_model(d_model=768, n_layer=24, vocab_size=50288)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "hf", config, tensors)
    write_state_spaces(tmp_path / "ss", config, tensors, vocab_size=50277)
    del tensors
    for dialect in ("hf", "ss"):
        result = run("gguf", tmp_path / dialect, tmp_path / f"{dialect}.gguf", "--type", "f16")
        assert result.exit_code == 0, result.output
        assert "no tokenizer.json" in result.stderr
    ours, theirs = open_gguf(tmp_path / "hf.gguf"), open_gguf(tmp_path / "ss.gguf")
    assert list(ours.tensors) == list(theirs.tensors)
    for name in ours.tensors:
        assert np.array_equal(ours.blocks(name), theirs.blocks(name)), name


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["gguf", "{fp}"], 2, "missing argument OUTPUT"),
        (["gguf", "{fp}", "{out}", "--type", "q3"], 2, "'q3' is not one of"),
        (["gguf", "{fp}", "{out}", "--type", "f16", "--ptq", "rtn"], 2, "cannot be combined"),
        (["gguf", "/nowhere", "{out}"], 1, "/nowhere: no such folder"),
        (
            ["gguf", "{fp}", "/nowhere/m.gguf", "--type", "f16"],
            1,
            "/nowhere/m.gguf: cannot be written: No such file or directory",
        ),
        (["gguf", "{fp}", "{fp}", "--type", "f16"], 1, "is a folder"),
        (["gguf", "{fp}", "{out}", "--type", "f16", "--tokenizer", "/nowhere.json"], 1, "/nowhere.json"),
        (["verify", "{fp}", "/nowhere"], 1, "/nowhere: cannot be read: No such file or directory"),
        (["inspect", "/nowhere"], 1, "/nowhere: cannot be read"),
    ],
)
def test_bad_input_is_one_line(tmp_path, args, code, message):
    fp = write_small(tmp_path / "fp", mamba2_model(256, 1, 512, d_state=64))
    result = run(*(arg.format(fp=fp, out=tmp_path / "m.gguf") for arg in args))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp"]


def test_help_has_an_example():
    for command in ([], ["gguf"], ["verify"], ["inspect"]):
        assert "Example" in run(*command, "--help").stdout
