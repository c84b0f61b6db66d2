"""Transformations leave a model's function as it is: in fp64 within rounding, for every shape; and in a stock llama.cpp."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from qat.evaluate import evaluate
from qat.model import LanguageModel
from qat.model.mamba2 import Mamba2Mixer
from qat.ptq.cli import main
from qat.ptq.making import make
from qat.ptq.static import make_static, scanned_scales
from qat.ptq.statistics import gather, save, scanned_name, text_digest
from qat.ptq.transforms import TRANSFORMS, Work, apply
from qat.ptq.transforms.fold import fold, is_folded
from qat.ptq.transforms.hadamard import hadamard_matrix, orthogonal
from qat.ptq.transforms.rotate import hadamard, klt
from qat.ptq.transforms.sort import order, sort
from qat.quantizer import model_tensors
from tests.commands import invoke
from tests.llama import Llama
from tests.models import random_tensors, train_tokenizer
from tests.qat.double import logits
from tests.qat.tiny import tiny_config
from tests.tmexport import families
from tmexport.checkpoint import open_checkpoint, write_checkpoint
from tmexport.errors import UsageError
from tmexport.gguf.export import plan_export
from tmexport.model import Block, mamba2_model
from tmexport.model.branches.mamba1 import Mamba1

SHAPES = {
    "tied": {"d_model": 64},
    "untied, groups of B and C": {"d_model": 64, "n_groups": 4, "tie_embeddings": False, "headdim": 16},
    "8 groups": {"d_model": 128, "n_groups": 8, "headdim": 16},
    "768 = 12 x 64": {"d_model": 768, "headdim": 64, "n_layer": 1},
    "40 heads": {"d_model": 160, "headdim": 8, "n_layer": 1, "tie_embeddings": False},
}
IDS = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(1))


def work_of(shape, constant_last=False):
    config = tiny_config(**SHAPES[shape])
    tensors = {name: values.astype(np.float64) for name, values in random_tensors(config, 7).items()}
    if constant_last:
        tensors["backbone.norm_f.weight"][:] = 1.25
    return Work(config, tensors)


def difference(before, work):
    """Of the logits in fp64, relative to their spread."""
    config, tensors = before
    ids = IDS[0].numpy()
    wanted, found = logits(config, tensors, ids), logits(work.config, work.tensors, ids)
    return np.abs(wanted - found).max() / wanted.std()


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("names", [[name] for name in TRANSFORMS] + [["fold", "sort", "hadamard"], ["klt", "smooth", "sort"], ["sort", "online", "hadamard", "smooth"]], ids=" ".join)  # fmt: skip
def test_the_function_stays(shape, names):
    work = work_of(shape)
    before = (work.config, dict(work.tensors))
    apply(work, names, IDS, 3)
    assert difference(before, work) < 1e-11
    assert {name: t.shape for name, t in work.tensors.items()} == {n: t.shape for n, t in work.config.tensors.items()}
    changed = [name for name, values in before[1].items() if not np.array_equal(values, work.tensors[name])]
    assert any(name.endswith(("in_proj.weight", "out_proj.weight")) for name in changed)
    done = [step["name"] for step in work.done]
    assert [name for name in done if name in names or name != "fold"] == names
    json.dumps(work.done)


@pytest.mark.parametrize("turn", [hadamard, klt])
def test_a_tied_head_stays_tied_where_the_last_norm_is_constant(turn):
    work = work_of("tied", constant_last=True)
    before = (work.config, dict(work.tensors))
    turn(work, IDS, 0)
    assert work.config.tie_embeddings
    assert difference(before, work) < 1e-11
    work = work_of("tied")
    turn(work, IDS, 0)
    assert not work.config.tie_embeddings
    assert is_folded(work)


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 40, 144, 160, 240, 576, 768, 1536, 2048])
def test_hadamard_matrices(size):
    matrix = hadamard_matrix(size).astype(np.float64)  # exact, and by BLAS
    assert set(np.unique(matrix)) <= {-1, 1}
    assert np.array_equal(matrix @ matrix.T, size * np.eye(size))
    turn = orthogonal(size, np.random.default_rng(0))
    assert np.abs(turn @ turn.T - np.eye(size)).max() < 1e-12


def test_sizes_without_a_matrix_are_refused():
    for size in (3, 28, 36, 100):
        with pytest.raises(UsageError, match=f"no Hadamard matrix of {size} is known here"):
            hadamard_matrix(size)


def test_klt_gives_every_channel_the_same_variance():
    """In what the norms give, summed over the blocks: the diagonal of R^T M R is the mean eigenvalue (MambaQuant)."""
    work = work_of("tied")
    fold(work, None, 0)
    spread = []
    for turn in (None, hadamard, klt):
        other = Work(work.config, dict(work.tensors))
        if turn:
            turn(other, IDS, 0)
        found = gather(other.model(), IDS)
        total = sum(s.moments for name, s in found.items() if name.endswith("in_proj.weight"))
        spread.append(np.diag(total).std() / np.diag(total).mean())
    assert spread[2] < 1e-4 < spread[1]
    assert spread[1] < spread[0] or math.isclose(spread[1], spread[0], rel_tol=0.5)


def test_sort_stays_inside_groups_and_heads_and_puts_like_sizes_together():
    branch = tiny_config(d_model=128, n_groups=2, headdim=16).blocks[0].branches[0]
    rng = np.random.default_rng(5)
    mean = np.exp(2 * rng.standard_normal(branch.d_inner))
    channels, clusters = order(branch, mean, 0)
    assert sorted(channels) == list(range(branch.d_inner))
    per_group = branch.d_inner // branch.n_groups
    assert np.array_equal(channels // per_group, np.arange(branch.d_inner) // per_group)
    heads = (channels // branch.headdim).reshape(branch.n_heads, branch.headdim)
    assert (heads == heads[:, :1]).all()
    assert [sum(cluster[0] for cluster in group) for group in clusters] == [branch.n_heads // branch.n_groups] * 2
    assert all(sum(cluster[1:]) == branch.headdim for group in clusters for cluster in group)
    # neighbours are nearer in size than before: the spread inside runs of four
    inside = [np.log(m.reshape(-1, 4)).std(axis=1).mean() for m in (mean, mean[channels])]
    assert inside[1] < 0.5 * inside[0]


def test_an_outlier_channel_is_spread_by_a_rotation():
    work = work_of("tied")
    work.put("norm", 0, work.get("norm", 0) * np.where(np.arange(64) == 5, 30, 1))
    name = work.readers(0)[0].hf
    before = gather(work.model(), IDS)[name].largest
    hadamard(work, None, 0)
    after = gather(work.model(), IDS)[name].largest
    assert before.max() / np.median(before) > 10
    assert after.max() / np.median(after) < 2.5


def test_statistics_are_those_of_the_activations(tmp_path):
    model = work_of("untied, groups of B and C").model()
    seen = {}
    for name, module in model.projections().items():
        module.register_forward_pre_hook(lambda _m, i, name=name: seen.setdefault(f"{name}.weight", []).append(i[0]))
    for name, module in model.named_modules():
        if isinstance(module, Mamba2Mixer):
            module.conv1d.register_forward_hook(
                lambda _m, _i, o, name=name: seen.setdefault(f"{name}.scanned", []).append(o[0])
            )
    found = gather(model, IDS)
    assert set(found) == set(seen)
    assert scanned_name("backbone.layers.0.mixer.in_proj.weight") in found
    for name, site in found.items():
        x = torch.cat(seen[name]).flatten(0, 1).double().numpy()
        assert site.count == len(x) == IDS.numel()
        np.testing.assert_array_equal(site.largest, np.abs(x).max(0))
        np.testing.assert_allclose(site.mean, np.abs(x).mean(0), rtol=1e-12)
        if site.moments is not None:
            np.testing.assert_allclose(site.moments, x.T @ x, rtol=1e-10, atol=1e-10)
        wanted = np.quantile(np.abs(x), 0.99, method="inverted_cdf")
        assert wanted <= site.percentile(99) * (1 + 1e-12)
        assert site.percentile(99) <= wanted * 1.012
    save(found, IDS, tmp_path / "s.json")
    said = json.loads((tmp_path / "s.json").read_text())
    assert said["text"] == {"digest": text_digest(IDS), "sequences": 3, "tokens": IDS.numel()}
    assert set(said["sites"]) == set(found)


@pytest.fixture(
    scope="module", params=["mamba1", "llama", "granite", "granite-rope-8-groups", "falcon", "falcon-norm-2-groups"]
)
def other_family(request, tmp_path_factory):
    """A checkpoint that is no pure Mamba-2."""
    folder = tmp_path_factory.mktemp("family") / request.param
    if request.param == "mamba1":
        branch = Mamba1(d_model=64, d_inner=128, dt_rank=4)
        config = replace(tiny_config(d_model=64), family="mamba", blocks=(Block((branch,)),) * 2)
        write_checkpoint(folder, config, random_tensors(config, 7))
    else:
        families.save(request.param, folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("names", [[name] for name in TRANSFORMS] + [["sort", "klt"]], ids=" ".join)
def test_the_function_of_other_families_stays(other_family, names):
    """In torch's fp32, within its rounding; what was turned or sorted is no longer what it was."""
    work = Work.of(other_family)
    before, tensors = work.model()(IDS), dict(work.tensors)
    if "online" in names:
        with pytest.raises(UsageError, match="expected a pure Mamba-2"):
            apply(work, names, IDS, 3)
        return
    apply(work, names, IDS, 3)
    after = work.model()(IDS)
    assert float((after - before).abs().max() / before.std()) < 2e-4
    assert not all(np.array_equal(tensors[name], work.tensors[name]) for name in tensors) or names == ["sort"]


def test_llamacpp_runs_the_transformed_file_as_the_original(tmp_path):
    config = mamba2_model(256, 2, 512, d_state=64, n_groups=2)
    tokenizer, work = train_tokenizer(tmp_path / "tokenizer.json"), None
    answers = []
    for names in ([], ["fold", "sort", "hadamard"], ["klt", "smooth"]):
        work = Work(config, {n: v.astype(np.float64) for n, v in random_tensors(config, 3).items()})
        apply(work, names, IDS, 0)
        folder = tmp_path / "-".join(["c", *names])
        write_checkpoint(folder, work.config, work.rounded(), tokenizer)
        path = tmp_path / f"{folder.name}.gguf"
        plan_export(open_checkpoint(folder), "f16").write(path, lambda tensor: None)
        llama = Llama(path)
        if not answers:
            prompt = llama.tokenize("Fellow citizens of the Senate")
            found = llama.greedy(prompt, 8)
            answers = [(prompt + [t for t, _ in found[:i]], found[i]) for i in range(8)]
        else:
            for tokens, (token, probability) in answers:
                other, theirs = llama.next_token(tokens)
                assert abs(theirs - probability) < 0.01  # fp16 weights
                assert other == token or abs(theirs - probability) < 0.005


@pytest.fixture
def teacher(tmp_path, tokenizer_path):
    torch.manual_seed(0)
    model = LanguageModel(tiny_config(d_model=64, n_layer=2, vocab_size=300, eos_token_id=0))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    write_checkpoint(tmp_path / "teacher", model.config, model_tensors(model), tokenizer_path)
    return tmp_path / "teacher"


def test_a_checkpoint_says_what_was_done(teacher, tmp_path):
    make("rtn", teacher, tmp_path / "out", "int8", None, IDS, "int8", transforms=["sort", "hadamard"], seed=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    provenance = config["provenance"]
    assert [step["name"] for step in provenance["transforms"]] == ["sort", "fold", "hadamard"]
    assert provenance["calibration"]["digest"] == text_digest(IDS)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert not checkpoint.config.tie_embeddings
    assert checkpoint.kind("lm_head.weight") == "int8"
    assert not list(tmp_path.glob(".transformed-*"))
    with pytest.raises(UsageError, match="--transform klt reads calibration text; add --data"):
        make("rtn", teacher, tmp_path / "no", "int8", transforms=["klt"])
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["quamba2", "mambaquant", "gptq"])
def test_recipes(teacher, corpus, tmp_path, name):
    words = ["recipe", name, "--teacher", teacher, "--data", corpus, "--samples", 4, "--seq-len", 32, "--threads", 1]
    done = invoke(main, *words, "--bits", "w8a8", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "run it with --profile fast" in done.stdout
    assert "MB" in done.stdout
    assert evaluate(tmp_path / "out", [corpus]).bits_per_byte == pytest.approx(
        evaluate(teacher, [corpus]).bits_per_byte, rel=2e-3
    )
    assert json.loads((tmp_path / "out" / "statistics.json").read_text())["text"]["sequences"] == 4
    done = invoke(main, "recipe", name, "--teacher", teacher, "--out", tmp_path / "other")
    assert done.exit_code == 2
    assert "add --data" in done.stderr


def test_sort_leaves_what_is_no_mamba2(tmp_path):
    work = work_of("tied")
    sort(work, IDS, 0)
    assert work.done == [{"name": "sort", "clusters": work.done[0]["clusters"], "seed": 0}]
    assert set(work.done[0]["clusters"]) == {"0", "1"}


def test_static_scales():
    """By hand: one for all; one for x and each B and C; one a cluster of x. A rounded model is near, and its inputs are on the grid."""
    branch = tiny_config(d_model=16, headdim=8, d_state=4, n_groups=2, expand=2).blocks[0].branches[0]
    largest = np.arange(1.0, branch.conv_dim + 1)  # x 32, then B 4 4, C 4 4
    assert (scanned_scales(branch, largest, False, None) == 48 / 127).all()
    scales = scanned_scales(branch, largest, True, None) * 127
    np.testing.assert_allclose(scales, [32] * 32 + [36] * 4 + [40] * 4 + [44] * 4 + [48] * 4)
    scales = scanned_scales(branch, largest, True, [[[2, 3, 5]], [[1, 8], [1, 4, 4]]]) * 127
    wanted = [11] * 3 + [16] * 5 + [11] * 3 + [16] * 5 + [24] * 8 + [28] * 4 + [32] * 4
    np.testing.assert_allclose(scales[:32], wanted)
    work = work_of("tied")
    model, seen = work.model(), []
    make_static(model, gather(model, IDS))
    model.backbone.layers[0].mixer.in_proj.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        found, exact = model(IDS), work.model()(IDS)
    assert 1e-4 < float((found - exact).std() / exact.std()) < 0.1
    codes = seen[0] / seen[0].abs().max() * 127
    assert float((codes - codes.round()).abs().max()) < 1e-3
