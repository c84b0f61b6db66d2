"""Methods without training: what each promises, checked on numbers made outside of it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qat.evaluate import evaluate
from qat.model import LanguageModel, load_model
from qat.ptq.awq import best_factor, fold
from qat.ptq.calibration import Inputs, walk
from qat.ptq.cli import main
from qat.ptq.gptq import gptq_weight
from qat.ptq.making import METHODS, calibration_ids, make
from qat.ptq.sigma_delta import shaped
from qat.quantizer import model_tensors
from tests.commands import invoke
from tests.qat.tiny import tiny_config
from tmexport.checkpoint import EMBEDDING, open_checkpoint, write_checkpoint
from tmexport.errors import CheckpointError, UsageError
from tmexport.model import mamba1_model
from tmexport.types import KINDS

METHODS_AND_KINDS = [(method, kind) for method in METHODS for kind in KINDS]


@pytest.fixture
def teacher(tmp_path, tokenizer_path):
    torch.manual_seed(0)
    model = LanguageModel(tiny_config(d_model=128, n_layer=2, vocab_size=300, eos_token_id=0))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # norms, too
    write_checkpoint(tmp_path / "teacher", model.config, model_tensors(model), tokenizer_path)
    return tmp_path / "teacher"


@pytest.fixture
def ids():
    return torch.randint(0, 300, (5, 40), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("method", "kind"), METHODS_AND_KINDS)
def test_every_method_writes_a_checkpoint_that_is_exactly_of_its_kind(teacher, ids, tmp_path, method, kind):
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    size = min(128, KINDS[kind].group_sizes[0])
    zero_ratio = make(method, teacher, tmp_path / "out", kind, size, ids).zero_ratio
    found, source = open_checkpoint(tmp_path / "out"), open_checkpoint(teacher)
    zeros = []
    for name in source.names:
        if name in source.config.projections:
            assert (found.form(name).kind, found.form(name).group_size) == (kind, size)
            codes = found.codes(name).codes
            if KINDS[kind].exact:
                again = KINDS[kind].exact(found.dense(name), name, size)  # raises if it is not
                assert np.array_equal(again.codes, codes)
            zeros.append(codes == 0)
        elif method != "awq" or not name.endswith("norm.weight"):
            assert np.array_equal(found.dense(name), source.dense(name)), name
    assert zero_ratio == pytest.approx(np.mean(np.concatenate([z.ravel() for z in zeros])))
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    assert torch.isfinite(load_model(tmp_path / "out")(ids)).all()


def test_rounding_is_the_rule_of_the_kind(teacher, tmp_path):
    for kind in ("ternary", "binary"):
        make("rtn", teacher, tmp_path / kind, kind, 128)
        source, rounded = open_checkpoint(teacher), open_checkpoint(tmp_path / kind)
        for name in source.config.projections:
            grouped = source.dense(name).astype(np.float64).reshape(-1, 128)
            scale = np.abs(grouped).mean(1).astype(np.float32).astype(np.float16).astype(np.float64)
            codes = {
                "ternary": np.rint(np.clip(grouped / scale[:, None], -1, 1)),
                "binary": np.where(grouped < 0, -1, 1),
            }[kind]
            assert np.mean(rounded.codes(name).codes.reshape(-1, 128) == codes) > 0.999


@pytest.mark.parametrize("kind", list(KINDS))
def test_gptq_lowers_the_error_of_the_output(kind):
    torch.manual_seed(1)
    weight = torch.randn(32, 256)
    x = torch.randn(500, 16) @ torch.randn(16, 256) + 0.3 * torch.randn(500, 256)  # correlated inputs
    moments = (x.double().T @ x.double()).numpy()

    def error(tensor):  # the squared error of the output, from the moments, in fp64
        difference = tensor.dense().astype(np.float64) - weight.double().numpy()
        return np.einsum("ij,jk,ik->", difference, moments, difference)

    size = min(128, KINDS[kind].group_sizes[0])
    rounded = KINDS[kind].quantize(weight.numpy(), size)
    corrected = gptq_weight(weight, torch.from_numpy(moments), kind, size).check("w")
    assert error(corrected) < 0.5 * error(rounded)
    # Uncorrelated inputs leave nothing to correct.
    plain = gptq_weight(weight, torch.eye(256, dtype=torch.float64), kind, size)
    assert np.array_equal(plain.codes, rounded.codes)
    assert np.array_equal(plain.scales, rounded.scales)


def test_blocks_are_rounded_and_run(teacher, tmp_path):
    """By the rule of the kind (tests/tmexport/test_types.py holds that); and a finer grid is nearer to the teacher."""
    source, errors = open_checkpoint(teacher), {}
    for kind in ("int8", "int4", "ternary"):
        make("rtn", teacher, tmp_path / kind, kind, None if kind != "ternary" else 128)
        rounded = open_checkpoint(tmp_path / kind)
        for name in source.config.projections:
            wanted = KINDS[kind].quantize(source.dense(name), rounded.form(name).group_size)
            assert np.array_equal(rounded.codes(name).codes, wanted.codes)
            assert np.array_equal(rounded.codes(name).scales, wanted.scales)
            error = np.square(rounded.dense(name) - source.dense(name)).mean() / np.square(source.dense(name)).mean()
            errors.setdefault(kind, []).append(error)
    assert (
        np.max(errors["int8"])
        < 1e-4
        < np.min(errors["int4"])
        < np.max(errors["int4"])
        < 0.02
        < np.min(errors["ternary"])
    )


def test_walk_gathers_what_enters_each_projection(teacher, ids):
    model = load_model(teacher)
    seen = {}
    for name, module in model.projections().items():
        module.register_forward_pre_hook(lambda _m, inputs, name=name: seen.update({name: inputs[0].double()}))
    with torch.no_grad():
        model(ids)
    names = []
    for projection in walk(load_model(teacher), ids):
        x = seen[projection.name.removesuffix(".weight")].flatten(0, 1)
        assert projection.inputs.count == len(x) == ids.numel()
        torch.testing.assert_close(projection.inputs.moments, x.T @ x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(projection.inputs.magnitude, x.abs().mean(0), rtol=1e-4, atol=1e-6)
        names.append(projection.name)
    assert tuple(names) == model.config.projections


def test_awq_is_the_same_model_before_rounding(teacher, ids):
    """In fp64: (normal * norm / f) (W f)^T is (normal * norm) W^T; and the folded model gives the teacher's logits."""
    original, model = load_model(teacher), load_model(teacher)
    normal = np.random.default_rng(0).standard_normal((7, 128))
    layer, before = model.backbone.layers[0], original.backbone.layers[0]
    for projection in walk(model, ids):
        factor = best_factor(projection, "ternary", 64)
        factor = factor * torch.linspace(0.5, 2, len(factor))  # whichever was best, this one is not 1
        fold(projection, factor)
    for norm, module, old_norm, old in (
        (layer.norm, layer.mixer.in_proj, before.norm, before.mixer.in_proj),
        (layer.mixer.norm, layer.mixer.out_proj, before.mixer.norm, before.mixer.out_proj),
    ):
        assert not torch.equal(norm.weight, old_norm.weight)
        x = normal if module.in_features == 128 else np.tile(normal, 2)
        a, b, c, d = (p.detach().double().numpy() for p in (norm.weight, module.weight, old_norm.weight, old.weight))
        assert np.abs((x * a) @ b.T - (x * c) @ d.T).max() < 1e-5 * np.abs((x * c) @ d.T).max()  # factors are fp32
    with torch.no_grad():
        torch.testing.assert_close(model(ids), original(ids), rtol=1e-4, atol=1e-4)


def test_awq_says_what_it_cannot_scale(ids):
    """No norm stands before what Mamba-1's mixer multiplies inside."""
    model = LanguageModel(mamba1_model(128, 1, 300)).requires_grad_(False)
    projection = next(walk(model, ids))
    with pytest.raises(UsageError, match="AWQ needs a norm before backbone.layers.0.mixer"):
        fold(projection, torch.ones(128))


def test_awq_factor_beats_none():
    """Channels with large inputs and small weights, which rounding alone would lose: the error of the output, in fp64."""
    torch.manual_seed(2)
    module = torch.nn.Linear(128, 64, bias=False).requires_grad_(False)
    x = torch.randn(400, 128, dtype=torch.float64)
    x[:, :8] *= 30
    module.weight[:, :8] /= 30
    inputs = Inputs(torch.zeros(128, 128, dtype=torch.float64), torch.zeros(128, dtype=torch.float64))
    inputs.add(x[:150])
    inputs.add(x[150:])
    factor = best_factor(SimpleNamespace(module=module, inputs=inputs), "ternary", 64)

    def error(f):
        rounded = torch.from_numpy(KINDS["ternary"].quantize((module.weight * f).numpy(), 64).dense()).double()
        return ((x / f) @ rounded.T - x @ module.weight.double().T).square().sum()

    assert error(factor) < 0.7 * error(torch.ones(128))


def test_sigma_delta_bounds_the_sum_of_errors():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    ours, nearest = shaped(weight, "ternary", 64), KINDS["ternary"].quantize(weight.numpy(), 64)
    assert np.array_equal(ours.scales, nearest.scales)
    sums = [np.abs((weight.numpy() - tensor.dense()).sum(1)).mean() for tensor in (ours, nearest)]
    assert sums[0] < 0.3 * sums[1]


def test_commands(teacher, corpus, tmp_path):
    for method in METHODS:
        out = tmp_path / method
        words = [method, "--teacher", teacher, "--out", out, "--group-size", 64, "--json"]
        if METHODS[method].reads_text:
            words += ["--data", corpus, "--samples", 3, "--seq-len", 32, "--threads", 1]
        done = invoke(main, *words)
        assert done.exit_code == 0, done.stderr
        said = json.loads(done.stdout)
        assert (said["method"], said["weights"]) == (method, "ternary")
        assert evaluate(out, [corpus]).tokens > 0
    done = invoke(main, "rtn", "--teacher", teacher, "--out", tmp_path / "binary", "--weights", "binary")
    assert done.exit_code == 0, done.stderr
    assert open_checkpoint(tmp_path / "binary").group_size == 128
    words = ("--teacher", teacher, "--out", tmp_path / "blocks", "--weights", "int4", "--embedding", "int8")
    done = invoke(main, "rtn", *words)
    assert done.exit_code == 0, done.stderr
    found = open_checkpoint(tmp_path / "blocks")
    rounded = KINDS["int8"].quantize(open_checkpoint(teacher).dense(EMBEDDING), 32)
    assert np.array_equal(found.codes(EMBEDDING).codes, rounded.codes)
    assert found.kind(found.config.projections[0]) == "int4"
    # The seed picks the text; the same seed picks the same.
    first, again, other = (calibration_ids(teacher, [corpus], None, 3, 32, s, tmp_path / "cache") for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_refusals(teacher, tmp_path):
    with pytest.raises(UsageError, match="group size 256 does not fit rows of 128"):
        make("rtn", teacher, tmp_path / "out", group_size=256)
    make("rtn", teacher, tmp_path / "low", group_size=64)
    with pytest.raises(CheckpointError, match="holds low-bit weights already"):
        make("rtn", tmp_path / "low", tmp_path / "out", group_size=64)
    with pytest.raises(UsageError, match="is the teacher's folder"):
        make("rtn", teacher, teacher, group_size=64)


def _ternary_teacher(teacher, folder, scale, group=None):
    """The teacher with projections of random codes times one scale (or one a group); its checkpoint and the codes."""
    source, rng, codes = open_checkpoint(teacher), np.random.default_rng(5), {}
    tensors = {name: source.dense(name) for name in source.names}
    for name in source.config.projections:
        n, k = tensors[name].shape
        codes[name] = rng.integers(-1, 2, (n, k)).astype(np.int8)
        scales = np.full((n, 1), scale, np.float32) if group is None else scale * rng.integers(1, 9, (n, k // group))
        tensors[name] = codes[name] * np.repeat(scales, k // scales.shape[1], 1).astype(np.float32)
    write_checkpoint(folder, source.config, tensors, source.tokenizer)
    return codes


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("scale", [np.float32(0.0213456789), np.float32(0.0625)], ids=["bitnet", "fp16"])
def test_a_model_that_is_ternary_already_keeps_its_codes_and_scales(teacher, ids, tmp_path, method, scale):
    codes = _ternary_teacher(teacher, tmp_path / "ternary", scale)
    make(method, tmp_path / "ternary", tmp_path / "out", "ternary", 64, ids)
    found, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "ternary")
    for name, expected in codes.items():
        coded = found.codes(name)
        assert np.array_equal(coded.codes, expected)
        assert (coded.scales == np.float16(scale)).all()
    assert all(np.array_equal(found.dense(n), source.dense(n)) for n in source.names if n not in codes)


def test_groups_of_a_ternary_model_are_the_default_and_never_joined(teacher, tmp_path):
    codes = _ternary_teacher(teacher, tmp_path / "ternary", 2**-9, group=64)
    make("rtn", tmp_path / "ternary", tmp_path / "out")
    found, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "ternary")
    assert found.group_size == 64
    assert all(np.array_equal(found.dense(n), source.dense(n)) for n in codes)
    with pytest.raises(UsageError, match="is ternary already, in groups of 64, which groups of 128 would change"):
        make("rtn", tmp_path / "ternary", tmp_path / "wide", group_size=128)
