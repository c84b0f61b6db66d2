"""The chunked loss against the textbook formula and numerical differentiation."""

import pytest
import torch
import torch.nn.functional as F

import qat.losses
from qat.losses import distillation_loss


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
