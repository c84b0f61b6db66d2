"""The chunked loss against the textbook formula and numerical differentiation."""

import pytest
import torch
import torch.nn.functional as F

import qat.losses
from qat.losses import TopPredictions, alignment_loss, distillation_loss


def inputs(dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 7, dtype=dtype, requires_grad=True)
    head = torch.randn(11, 7, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5))
    teacher_hidden, teacher_head = torch.randn(3, 5, 4, dtype=dtype), torch.randn(11, 4, dtype=dtype)
    return hidden, head, targets, teacher_hidden, teacher_head


def textbook(hidden, head, targets, teacher_hidden, teacher_head, w, t):
    logits, known = (hidden @ head.T).flatten(0, 1), (teacher_hidden @ teacher_head.T).flatten(0, 1)
    ce = F.cross_entropy(logits, targets.flatten())
    kl = F.kl_div(F.log_softmax(logits / t, -1), F.log_softmax(known / t, -1), reduction="batchmean", log_target=True)
    return (1 - w) * ce + w * t * t * kl, ce, kl


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_equals_the_formula(monkeypatch, w, t, rows):
    monkeypatch.setattr(qat.losses, "_LOGITS_AT_ONCE", rows * 11)
    ours, theirs = inputs(torch.float32), inputs(torch.float32)
    loss = distillation_loss(*ours, w, t)
    total, ce, kl = textbook(*theirs, w, t)
    (3 * loss.total).backward()
    (3 * total).backward()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(loss.cross_entropy, ce)
    if w > 0:
        torch.testing.assert_close(loss.kl, kl)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, atol=1e-6, rtol=1e-5)


def test_without_a_teacher_it_is_cross_entropy():
    hidden, head, targets, *_ = inputs(torch.float32)
    loss = distillation_loss(hidden, head, targets)
    torch.testing.assert_close(loss.total, F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten()))
    assert loss.kl == 0


def test_teacher_equal_to_student_has_no_divergence():
    hidden, head, targets, *_ = inputs(torch.float32)
    loss = distillation_loss(hidden, head, targets, hidden, head.detach(), 1.0, 2.0)
    loss.total.backward()
    assert abs(loss.total) < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_scoring_makes_no_gradients():
    hidden, head, targets, *_ = inputs(torch.float32)
    with torch.no_grad():
        loss = distillation_loss(hidden, head, targets)
    assert not loss.total.requires_grad


def top_of(teacher_hidden, teacher_head, k, t):
    log_q = F.log_softmax(teacher_hidden @ teacher_head.T / t, -1)
    values, ids = log_q.topk(k, -1)
    tail = 1 - values.exp().sum(-1)
    return TopPredictions(ids, values, tail.clamp_min(1e-12).log())


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, 10])
def test_top_predictions_equal_the_formula_over_k_plus_one_events(k, t):
    ours, theirs = inputs(torch.float32), inputs(torch.float32)
    top = top_of(ours[3], ours[4], k, t)
    loss = distillation_loss(*ours[:3], kd_weight=0.4, temperature=t, top=top)
    loss.total.backward()
    logits = (theirs[0] @ theirs[1].T).flatten(0, 1)
    p = F.softmax(logits / t, -1)
    flat = top.flatten()
    p_top = p.gather(-1, flat.ids)
    p_tail = 1 - p_top.sum(-1)
    kl = (flat.log_q.exp() * (flat.log_q - p_top.log())).sum(-1) + flat.log_tail.exp() * (flat.log_tail - p_tail.log())
    total = 0.6 * F.cross_entropy(logits, theirs[2].flatten()) + 0.4 * t * t * kl.mean()
    total.backward()
    torch.testing.assert_close(loss.total, total)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, atol=1e-6, rtol=1e-4)


def test_all_tokens_as_top_predictions_equal_the_full_divergence():
    ours, theirs = inputs(torch.float32), inputs(torch.float32)
    a = distillation_loss(*ours[:3], kd_weight=1.0, top=top_of(ours[3], ours[4], 11, 1.0))
    b = distillation_loss(*theirs, 1.0)
    a.total.backward()
    b.total.backward()
    torch.testing.assert_close(a.kl, b.kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, atol=1e-5, rtol=1e-4)


def test_alignment_is_a_share_of_what_a_layer_adds():
    torch.manual_seed(0)
    double, triple = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
    with torch.no_grad():
        double.weight.copy_(2 * torch.eye(4))
        triple.weight.copy_(3 * torch.eye(4))
    hidden = torch.randn(2, 3, 4)
    # teacher: h -> 2h -> 4h adds h, then 2h; student: h -> 3h (off by h: 1), and 2h -> 6h (off by 2h: 1)
    stream = [hidden, double(hidden), double(double(hidden))]
    loss = alignment_loss([triple, triple], [part.detach() for part in stream])
    assert loss.item() == pytest.approx(1.0)
    assert alignment_loss([double], stream[:2]).item() == 0.0
    with pytest.raises(ValueError, match="shorter"):
        alignment_loss([double, double], stream[:2])
    loss.backward()
    assert triple.weight.grad is not None
    assert double.weight.grad is None
