"""A Transformer becomes a hybrid: weights where they belong, fits against other formulas, and a stock llama.cpp that agrees."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import qat.convert.cli
from qat.convert.fitting import fit_out_proj, mixer_in, rank_layers
from qat.convert.making import convert, started, untrained
from qat.convert.shape import hybrid_of, kept_layers
from qat.convert.starting import constant_function, decay_rates, start_mixer
from qat.model import LanguageModel, load_model
from tests.commands import invoke
from tests.llama import Llama
from tests.models import train_tokenizer
from tests.tmexport.families import save
from tmexport.checkpoint import open_checkpoint
from tmexport.errors import CheckpointError, UsageError
from tmexport.gguf.export import plan_export
from tmexport.gguf.reader import open_gguf
from tmexport.model import llama_model, mamba2_model
from tmexport.model.branches.mamba2 import Mamba2
from tmexport.verify import verify_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save("llama", path)
    train_tokenizer(path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def teacher(folder):
    return load_model(folder).requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 500, (6, 48), generator=torch.Generator().manual_seed(3))


def llama(bias=False, heads=4, width=64, head_dim=16):
    """A small random Transformer that uses every weight."""
    torch.manual_seed(0)
    model = LanguageModel(llama_model(width, 2, 300, heads, 96, 2, head_dim, bias=bias, tie_embeddings=True))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def test_all_layers_kept_is_the_transformer(teacher, ids):
    for kept in ((0, 1, 2), range(3)):
        assert torch.equal(started(teacher, kept, ids)(ids), teacher(ids))


def test_kept_layers_and_everything_but_the_mixers_are_the_teachers(teacher, ids):
    hybrid = started(teacher, (1,), ids)
    own = dict(hybrid.named_parameters())
    shared = {name: tensor for name, tensor in teacher.named_parameters() if name in own}
    assert all(torch.equal(own[name], tensor) for name, tensor in shared.items())
    assert {name.split(".")[3] for name in set(own) - set(shared)} == {"mamba2"}
    assert [mixer_in(block) is not None for block in hybrid.backbone.blocks] == [True, False, False, False, True, False]


@pytest.mark.parametrize("head_dim", [16, 32], ids=["two heads a head", "one"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_started_mixer_is_decaying_attention_without_softmax(bias, head_dim):
    """Against the sum over positions written out in fp64, from q, k, v and the decays alone."""
    model = llama(bias, head_dim=head_dim)
    block = model.backbone.blocks[0]
    hidden = block.norm(torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(1)) + 0.5)
    hybrid = started(model, (1,), torch.arange(12)[None])
    mixer = mixer_in(hybrid.backbone.blocks[0])
    start_mixer(mixer, block.branches[0], hidden)
    seen = []
    mixer.scanned.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0].double()))
    mixer(hidden)
    attention, per_group = block.branches[0], 128 // (4 * head_dim)

    def heads(name, repeats):
        projection = getattr(attention, name)
        out = hidden.double() @ projection.weight.double().T
        out = out + projection.bias.double() if bias else out
        return out.unflatten(-1, (-1, head_dim)).repeat_interleave(repeats, 2)

    q, k, v = heads("q_proj", 1), heads("k_proj", 2), heads("v_proj", 2)
    plain = hidden.double() @ attention.v_proj.weight.double().T
    plain = plain.unflatten(-1, (-1, head_dim)).repeat_interleave(2, 2)
    v = v * (0.3 / plain.square().mean((0, 1, 3)).sqrt())[:, None]
    q, k, v = (silu(m) for m in (q, k, v))
    distance = torch.arange(12)[:, None] - torch.arange(12)
    for head in range(4 * per_group):
        rate, group = decay_rates(per_group)[head % per_group], head // per_group
        mixing = torch.einsum("btn,bsn->bts", q[:, :, group], k[:, :, group]) * rate
        mixing = mixing * torch.where(distance >= 0, torch.exp(-rate * distance.double()), 0.0)
        torch.testing.assert_close(seen[0][:, :, head], mixing @ v[:, :, group], rtol=2e-3, atol=1e-5)


def silu(x):
    return x / (1 + torch.exp(-x))


def test_the_gate_is_divided_out_where_the_input_has_a_constant_part():
    inputs = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + torch.arange(8.0)
    row = constant_function(inputs)
    assert torch.allclose(inputs @ row, torch.ones(500), atol=0.1)


def test_out_proj_is_the_least_squares_solution(teacher, ids):
    hybrid = started(teacher, (1,), ids)
    block = hybrid.backbone.blocks[0]
    mixer = mixer_in(block)
    features = []
    handle = mixer.out_proj.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
    hidden = teacher.backbone.embed(ids)
    wanted = teacher.backbone.blocks[0](hidden) - hidden
    error = fit_out_proj(block, hidden, wanted)
    handle.remove()
    x, y = torch.cat(features).flatten(0, 1).double().numpy(), wanted.flatten(0, 1).double().numpy()
    ridge = 0.03 * (x * x).sum(0).mean()
    wide = np.vstack([x, np.sqrt(ridge) * np.eye(x.shape[1])])  # the ridge as more rows: lstsq, not normal equations
    weight = np.linalg.lstsq(wide, np.vstack([y, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    np.testing.assert_allclose(mixer.out_proj.weight.numpy(), weight.T, atol=1e-4)
    left = (block(hidden) - hidden - wanted).square().sum() / wanted.square().sum()
    assert error == pytest.approx(left.item(), rel=1e-3)


def test_auto_keeps_the_layer_whose_replacement_costs_most(teacher, ids):
    """The layers' ranks are those of models put together by hand, one layer replaced in each."""
    hybrid = started(teacher, (), ids)
    costs = rank_layers(teacher, hybrid, ids, 2)
    wanted = teacher(ids[-2:]).log_softmax(-1)
    for layer, cost in costs.items():
        single = untrained(teacher, [other for other in range(3) if other != layer])
        state = {k: v for k, v in hybrid.state_dict().items() if k in single.state_dict()}
        single.load_state_dict(state | {k: v for k, v in teacher.state_dict().items() if k in single.state_dict()})
        found = single(ids[-2:]).log_softmax(-1)
        assert cost == pytest.approx((wanted.exp() * (wanted - found)).sum(-1).mean().item(), rel=1e-3, abs=1e-5)


@pytest.mark.peer
@pytest.mark.slow
def test_llama_cpp_loads_the_hybrid_and_agrees(folder, corpus, tmp_path):
    """Also what the command says; the kept layer has RoPE."""
    result = invoke(
        qat.convert.cli.main, "--transformer", folder, "--keep", "1,", "--data", corpus, "--out", tmp_path / "hybrid",
        "--samples", 8, "--seq-len", 64, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["layers"], said["kept"], set(said["errors"])) == (3, [1], {"0", "2"})
    checkpoint = open_checkpoint(tmp_path / "hybrid")
    assert sum(np.prod(t.shape) for t in checkpoint.config.tensors.values()) == said["parameters"]
    assert checkpoint.tokenizer is not None
    path = tmp_path / "m.gguf"
    plan_export(checkpoint, "f16").write(path, lambda tensor: None)
    assert verify_gguf(checkpoint, open_gguf(path)).difference is None
    model = load_model(tmp_path / "hybrid").requires_grad_(False)
    server, tokens = Llama(path), [5, 17, 200, 81, 9, 44, 300, 21]
    for _ in range(6):
        token, log_p = server.next_token(tokens)
        wanted = model(torch.tensor([tokens])).log_softmax(-1)[0, -1]
        assert wanted[token] >= wanted.max() - 0.02
        assert log_p == pytest.approx(wanted[token].item(), abs=0.05)
        tokens.append(token)


def test_text_for_people_and_auto(folder, corpus, tmp_path):
    result = invoke(
        qat.convert.cli.main, "--transformer", folder, "--data", corpus, "--out", tmp_path / "h", "--samples", 4,
        "--seq-len", 32,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "attention    kept in 1 of 3 layers" in result.stdout
    assert result.stdout.count("replaced alone costs") == 3
    assert "at 6% of its bf16 peak, as measured" in result.stdout


def test_which_layers():
    assert kept_layers("8", 30) == (1, 5, 9, 13, 16, 20, 24, 28)
    assert kept_layers("3,1", 4) == (1, 3)
    assert (kept_layers("auto", 30), kept_layers("auto:15", 30)) == (8, 15)
    for wrong in ("0", "30", "0,30", "auto:0", "many", "auto:x", ",", "-1", "1,-1"):
        with pytest.raises(UsageError, match="--keep"):
            kept_layers(wrong, 30)


def test_what_cannot_be_converted_is_refused(folder, corpus, tmp_path):
    with pytest.raises(UsageError, match="is a mamba2; expected a Transformer"):
        hybrid_of(mamba2_model(d_model=64, n_layer=2, vocab_size=300, d_state=16, headdim=32), ())
    with pytest.raises(UsageError, match="3 heads of 32 do not divide the mixer's 128 channels"):
        hybrid_of(llama_model(64, 2, 300, 3, 96, 3, 32), ())
    with pytest.raises(UsageError, match="is the Transformer's folder"):
        convert(folder, "1", folder, torch.zeros(1, 8, dtype=torch.long))
    result = invoke(qat.convert.cli.main, "--transformer", folder, "--out", tmp_path / "x")
    assert (result.exit_code, "add --data" in result.stderr) == (2, True)
    result = invoke(
        qat.convert.cli.main, "--transformer", tmp_path / "no.gguf", "--data", corpus, "--out", tmp_path / "x"
    )
    assert result.exit_code == 1
    assert not (tmp_path / "x").exists()


def test_low_bit_weights_are_refused(folder, corpus, tmp_path):
    from qat.ptq.making import make

    make("rtn", folder, tmp_path / "low", group_size=64)
    with pytest.raises(CheckpointError, match="holds low-bit weights"):
        convert(tmp_path / "low", "1", tmp_path / "x", torch.zeros(1, 8, dtype=torch.long))


def test_the_mixer_has_a_group_a_head():
    mixer = hybrid_of(llama_model(576, 30, 49152, 9, 1536, 3), ()).blocks[0].branches[0]
    assert mixer == Mamba2(576, 1152, 64, 4, 64, 9)
