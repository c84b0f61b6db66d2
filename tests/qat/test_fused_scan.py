"""The adapter to mamba_ssm's fused scan, against a stand-in that computes what mamba_ssm documents, step by step."""

import sys
import types

import pytest
import torch

import qat.model.ssd
from qat.model.ssd import choose_scan, chunked_scan, fused_scan


def documented_scan(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False, state_dtype=None,
):  # fmt: skip
    """mamba_ssm's interface: states [batch, nheads, headdim, dstate]; the recurrence of a Mamba-2 head, one step at a time."""
    batch, seqlen, nheads, headdim = x.shape
    assert dt.shape == (batch, seqlen, nheads)
    assert A.shape == (nheads,)
    assert B.shape == C.shape
    assert B.shape[:2] == (batch, seqlen)
    assert D.shape == (nheads,)
    assert z is dt_bias is seq_idx is cu_seqlens is state_dtype is None
    assert not dt_softplus
    assert not return_varlen_states
    assert dt_limit == (0.0, float("inf"))
    assert isinstance(chunk_size, int)
    heads_a_group = nheads // B.shape[2]
    state = torch.zeros(batch, nheads, headdim, B.shape[3], dtype=torch.float32)
    if initial_states is not None:
        assert initial_states.shape == state.shape
        state = initial_states.clone()
    out = torch.zeros(batch, seqlen, nheads, headdim)
    for n in range(batch):
        for h in range(nheads):
            group, s = h // heads_a_group, state[n, h]
            for t in range(seqlen):
                s = torch.exp(dt[n, t, h] * A[h]) * s + dt[n, t, h] * torch.outer(x[n, t, h], B[n, t, group])
                out[n, t, h] = s @ C[n, t, group] + D[h] * x[n, t, h]
            state[n, h] = s
    return (out, state) if return_final_states else out


@pytest.fixture
def stand_in(monkeypatch):
    qat.model.ssd.fused_kernel.cache_clear()
    names = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[names[-1]].mamba_chunk_scan_combined = documented_scan
    yield
    qat.model.ssd.fused_kernel.cache_clear()


@pytest.mark.parametrize("with_state", [False, True])
def test_adapter_equals_our_scan(stand_in, with_state):
    torch.manual_seed(4)
    batch, time, heads, headdim, groups, d_state = 2, 19, 4, 6, 2, 5
    x, dt = torch.randn(batch, time, heads, headdim), torch.rand(batch, time, heads)
    a, d = -torch.rand(heads) - 0.1, torch.randn(heads)
    b, c = torch.randn(2, batch, time, groups, d_state)
    state = torch.randn(batch, heads, d_state, headdim) if with_state else None
    ours, theirs = (scan(x, dt, a, b, c, d, 8, state) for scan in (chunked_scan, fused_scan))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert theirs[1].dtype == torch.float32


def test_chosen_on_cuda_only_and_only_where_it_imports(stand_in, monkeypatch):
    assert choose_scan(torch.device("cuda")) is fused_scan
    assert choose_scan(torch.device("cpu")) is chunked_scan
    assert choose_scan(torch.device("meta")) is chunked_scan
    qat.model.ssd.fused_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", None)
    assert choose_scan(torch.device("cuda")) is chunked_scan
