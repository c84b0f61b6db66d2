"""Our Mamba-2 against transformers', against its own recurrence, and through the checkpoint format."""

import numpy as np
import pytest
import torch
import transformers

from qat.model import LanguageModel, load_model
from qat.model.ssd import chunked_scan
from qat.quantizer import model_tensors
from tests.qat.tiny import tiny_config
from tmexport.checkpoint import expected_shapes, open_checkpoint, write_checkpoint


def peer_of(config):
    """A transformers model of the same dimensions with random weights, norms and D included."""
    torch.manual_seed(1)
    peer = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**{**config.to_hf(), "chunk_size": 48}))
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.eval()


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(n_groups, tied):
    config = tiny_config(n_groups=n_groups, tie_embeddings=tied)
    peer = peer_of(config)
    ours = LanguageModel(config)
    state = {name: tensor for name, tensor in peer.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert set(state) == set(expected_shapes(config))
    ours.load_state_dict(state)
    for length in (1, 37, 64, 128, 150):  # chunks: ours 32, theirs 48
        ids = torch.randint(0, config.vocab_size, (2, length))
        with torch.no_grad():
            wanted, got = peer(ids, use_cache=False).logits, ours(ids)
        assert wanted.abs().max() > 0.1
        assert (wanted - got).abs().max() < 1e-4, length


def test_gradients_equal_transformers():
    config = tiny_config(n_groups=2)
    peer, ours = peer_of(config), LanguageModel(config)
    ours.load_state_dict({k: v for k, v in peer.state_dict().items() if k != "lm_head.weight"})
    ids = torch.randint(0, config.vocab_size, (2, 71))
    for model in (peer, ours):
        logits = model(ids)
        logits = getattr(logits, "logits", logits)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = theirs[name].grad.abs().max()
        assert scale > 0
        assert (parameter.grad - theirs[name].grad).abs().max() < 1e-4 * scale + 1e-7, name


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
@pytest.mark.parametrize("compiled", [False, True])
def test_scan_equals_the_recurrence(chunk, compiled):
    torch.manual_seed(2)
    batch, time, heads, headdim, groups, d_state = 2, 23, 4, 8, 2, 6
    x = torch.randn(batch, time, heads, headdim, dtype=torch.float64)
    dt = torch.rand(batch, time, heads, dtype=torch.float64)
    a = -torch.rand(heads, dtype=torch.float64) - 0.1
    b, c = torch.randn(2, batch, time, groups, d_state, dtype=torch.float64)
    d = torch.randn(heads, dtype=torch.float64)
    state = torch.randn(batch, heads, d_state, headdim, dtype=torch.float64)
    wanted, current = [], state
    for t in range(time):
        key, query = (v[:, t].repeat_interleave(heads // groups, 1) for v in (b, c))
        decay = torch.exp(dt[:, t] * a)[:, :, None, None]
        current = decay * current + dt[:, t, :, None, None] * key[..., None] * x[:, t, :, None, :]
        wanted.append(torch.einsum("bhn,bhnp->bhp", query, current) + d[:, None] * x[:, t])
    scan = torch.compile(chunked_scan, backend="aot_eager", dynamic=False) if compiled else chunked_scan
    y, last = scan(x, dt, a, b, c, d, chunk, state)
    torch.testing.assert_close(y, torch.stack(wanted, 1), rtol=1e-5, atol=1e-5)  # the carried state is fp32
    torch.testing.assert_close(last.double(), current, rtol=1e-5, atol=1e-5)


def test_state_carries_over_any_split():
    config = tiny_config(n_groups=2)
    torch.manual_seed(3)
    model = LanguageModel(config)
    ids = torch.randint(0, config.vocab_size, (1, 100))
    with torch.no_grad():
        whole = model(ids)
        for cuts in ([50], [1, 2, 3], [64], [97]):
            states = model.fresh_states()
            parts = [model(part, states) for part in torch.tensor_split(ids, cuts, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_checkpoint_round_trip(tmp_path):
    model = LanguageModel(tiny_config(tie_embeddings=False))
    write_checkpoint(tmp_path, model.config, model_tensors(model))
    again = load_model(tmp_path)
    assert again.config.tie_embeddings is False
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    peer = transformers.Mamba2ForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert (peer(ids, use_cache=False).logits - model(ids)).abs().max() < 1e-4
    assert np.array_equal(open_checkpoint(tmp_path).dense("lm_head.weight"), model.lm_head.weight.detach().numpy())
