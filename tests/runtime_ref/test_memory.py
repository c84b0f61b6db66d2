"""How much memory a model needs, from its header; refusals before loading."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from runtime_ref.arithmetic import PRESETS
from runtime_ref.bench.sizes import file_sizes
from runtime_ref.generate import generate
from runtime_ref.memory import check_memory, need, parse_size
from runtime_ref.model import Model
from tests.models import write_small
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import TmexportError
from tmexport.gguf.export import EMBEDDING_TYPES, TYPES, low_bit_types, plan_export, tensor_layout
from tmexport.gguf.names import model_metadata
from tmexport.gguf.reader import open_gguf
from tmexport.gguf.writer import PlannedTensor, file_bytes, header_bytes
from tmexport.model import Block, mamba2_model
from tmexport.model import Model as ModelSpec
from tmexport.model.branches.attention import Attention
from tmexport.model.branches.mlp import SwiGLU
from tmexport.threads import default_threads
from tmexport.types import FILE_TYPES

BIG = mamba2_model(d_model=2048, n_layer=48, vocab_size=50288)  # 1.3b


def header_only(path, config, kind, embedding, group=256):
    """A file of the right size whose tensors are a hole: it opens, and loading it would fail."""
    layout = tensor_layout(config, low_bit_types(config, TYPES[kind], EMBEDDING_TYPES[embedding]))
    tensors = [PlannedTensor(n, shape, of, lambda: np.empty(0)) for n, (shape, of) in layout.items()]
    metadata = model_metadata(config, FILE_TYPES[TYPES[kind]], "m", None if kind == "f16" else group)
    with open(path, "wb") as file:
        file.write(header_bytes(metadata, tensors))
        file.truncate(file_bytes(metadata, tensors))
    return path


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512e6), ("1.5G", 1.5e9), ("800MB", 8e8), ("800 mb", 8e8), ("512MiB", 2**29), ("2Gi", 2**31), ("7", 7), ("64k", 64e3)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "0", "0.0G", "1e9", "12X", "5MM", "1I", "nan", "inf", "1,5G", "٣M", "1" + "2G3"]
)
def test_nonsense_is_no_size(text):
    with pytest.raises(ValueError, match="expected a number and a unit, such as 512M"):
        parse_size(text)


@pytest.mark.parametrize(
    ("kind", "embedding", "group"),
    [("tq1_0", "q8_0", 256), ("q2_0", "f16", 64), ("tq2_0", "q4_0", 256), ("f16", "f16", 256)],
)
def test_weights_are_those_of_a_loaded_model(tmp_path, kind, embedding, group):
    source = open_checkpoint(write_small(tmp_path / "c", group_size=group))
    plan_export(source, kind, embedding).write(tmp_path / "m.gguf", lambda t: None)
    gguf = open_gguf(tmp_path / "m.gguf")
    for profile in PRESETS:
        model = Model.load(tmp_path / "m.gguf", profile, 1)
        untied = sum(array.nbytes for array in model._built.embedding.packed)  # decoding reads one row of it
        own = need(gguf, profile, states=3)
        assert own.weights == model.weight_bytes + untied
        assert own.states == 3 * model.new_state().nbytes


def test_the_real_shape_by_hand_and_by_what_was_measured(tmp_path):
    gguf = open_gguf(header_only(tmp_path / "m.gguf", BIG, "tq2_0", "q8_0"))
    projections = 48 * (8512 * 2048 + 2048 * 4096) * (1 / 4 + 2 / 256)
    head = 50288 * 2048 * 34 / 32
    small = 48 * 4 * (2048 + 4352 * 4 + 4352 + 3 * 64 + 4096) + 4 * 2048
    assert need(gguf, "exact").weights == projections + head + small
    assert need(gguf, "exact").states == 48 * (3 * 4352 + 4096 * 128) * 4
    assert need(gguf, "compact").states == 48 * (3 * 4352 * 4 + 4096 * (128 + 4))
    # the most memory a process had that loaded it and decoded (docs/benchmarks.md), with the kernels compiled
    for profile, measured in (("exact", 705e6), ("fast", 645e6)):
        assert measured <= need(gguf, profile).total <= 1.2 * measured


def test_a_context_takes_keys_values_and_scores(tmp_path):
    """fp32 in profile exact: two rows of 64 a layer and position; 16 scores a thread and position."""
    blocks = (Block((Attention(256, 4, 1, 64, 0.125, 10000.0),)), Block((SwiGLU(256, 512),))) * 3
    needed = []
    for length in (1024, 3072):
        config = ModelSpec(256, 512, blocks, family="llama", context_length=length)
        needed.append(need(open_gguf(header_only(tmp_path / f"{length}.gguf", config, "f16", "f16")), "exact"))
    assert needed[1].states - needed[0].states == 2048 * 3 * 2 * 64 * 4
    assert needed[1].other - needed[0].other == 2048 * default_threads() * 16 * 4


def test_the_refusal_names_a_type_that_fits(tmp_path):
    path = header_only(tmp_path / "m.gguf", BIG, "tq2_0", "f16")
    own, limit = need(open_gguf(path), "exact").total, 830_000_000
    assert own > limit
    with pytest.raises(TmexportError, match=rf"m\.gguf: needs {own / 1e6:.0f} MB of memory in profile exact") as error:
        check_memory(path, limit, "exact")
    kind, embedding, promised = re.search(r"; (\w+) with a (\w+) embedding needs (\d+) MB$", str(error.value)).groups()
    smaller = open_gguf(header_only(tmp_path / "s.gguf", BIG, kind.lower(), embedding.lower()))
    assert f"{need(smaller, 'exact').total / 1e6:.0f}" == promised
    assert need(smaller, "exact").total <= limit
    assert check_memory(path, own, "exact").total == own
    with pytest.raises(
        TmexportError, match=r"the least, TQ2_0 with a Q4_0 embedding and --profile compact, needs \d+ MB$"
    ):
        check_memory(path, 10**8, "exact")
    with pytest.raises(
        TmexportError, match=r"TQ2_0 with a F16 embedding needs \d+ MB$"
    ):  # of a file that is not ternary
        check_memory(header_only(tmp_path / "f.gguf", BIG, "f16", "f16"), 930_000_000, "exact")


def test_generate_refuses_before_loading(tmp_path, monkeypatch):
    path = header_only(tmp_path / "m.gguf", BIG, "tq2_0", "q8_0")
    monkeypatch.setattr(Model, "load", lambda *args: pytest.fail("was loaded"))
    result = CliRunner().invoke(generate, [str(path), "--prompt", "a", "--max-memory", "512M"])
    assert isinstance(result.exception, TmexportError)
    assert result.exception.exit_code == 1
    assert "more than the 512 MB allowed" in str(result.exception)
    result = CliRunner().invoke(generate, [str(path), "--prompt", "a", "--max-memory", "lots"])
    assert result.exit_code == 2
    assert "'lots' is not an amount of memory" in result.output


@pytest.mark.parametrize("group", [256, 64])
def test_file_sizes_are_those_of_a_dry_run(tmp_path, group):
    source = open_checkpoint(write_small(tmp_path / "c", group_size=group))
    plan_export(source, "q2_0", "q8_0").write(tmp_path / "m.gguf", lambda t: None)
    told = {(s["type"], s["embedding"]): s["bytes"] for s in file_sizes(open_gguf(tmp_path / "m.gguf"))}
    assert told["Q2_0", "Q8_0"] == (tmp_path / "m.gguf").stat().st_size
    assert len(told) == 7
    for (kind, embedding), size in told.items():
        if group == 64 and kind.startswith("TQ"):
            assert size is None  # a block of 256 has one scale
        else:
            assert size == plan_export(source, kind.lower(), embedding.lower()).n_bytes
