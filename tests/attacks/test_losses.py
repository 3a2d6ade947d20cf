"""The losses against their formulas, written out class by class in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from synthfast.attacks import losses


@pytest.fixture
def drawn(generator):
    logits = 3 * torch.randn(50, 6, generator=generator)
    return logits, torch.randint(0, 6, (50,), generator=generator)


def by_formula(name, z, y, t):
    others = [value for k, value in enumerate(z) if k != y]
    ranked = sorted(z, reverse=True)
    return {
        "cross_entropy": math.log(sum(math.exp(value) for value in z)) - z[y],
        "ce_targeted": z[t] - math.log(sum(math.exp(value) for value in z)),
        "cw_margin": max(others) - z[y],
        "dlr": -(z[y] - max(others)) / (ranked[0] - ranked[2]),
        "dlr_targeted": -(z[y] - z[t]) / (ranked[0] - (ranked[2] + ranked[3]) / 2),
    }[name]


def call(name, logits, y, target):
    function = getattr(losses, name)
    return {"ce_targeted": lambda: function(logits, target), "dlr_targeted": lambda: function(logits, y, target)}.get(
        name, lambda: function(logits, y)
    )()


NAMES = ("cross_entropy", "ce_targeted", "cw_margin", "dlr", "dlr_targeted")


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_formula(drawn, name):
    logits, y = drawn
    target = (y + 1 + torch.arange(50) % 5) % 6
    expected = [by_formula(name, *row) for row in zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)]
    torch.testing.assert_close(call(name, logits, y, target), torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_is_float32_for_logits_of_any_type(drawn, name, dtype):
    logits, y = drawn
    target = (y + 1) % 6
    logits = logits.to(dtype)
    found = call(name, logits, y, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, call(name, logits.float(), y, target), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dlr", "dlr_targeted"])
def test_dlr_does_not_change_with_shift_and_scale(drawn, name):
    logits, y = drawn
    target = (y + 2) % 6
    torch.testing.assert_close(
        call(name, logits, y, target), call(name, 100 * logits + 7, y, target), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_finite_where_logits_are_equal_or_huge(name):
    logits = torch.tensor([[1.0, 1, 1, 1, 1], [5, 5, 0, 0, 0], [1e4, -1e4, 0, 0, 0]]).requires_grad_()
    y = torch.tensor([0, 0, 0])
    call(name, logits, y, torch.tensor([1, 1, 1])).sum().backward()
    assert logits.grad.isfinite().all()


def test_margin_is_positive_exactly_where_misclassified(drawn):
    logits, y = drawn
    wrong = logits.argmax(1) != y
    assert wrong.any() and not wrong.all()
    assert torch.equal(losses.cw_margin(logits, y) > 0, wrong)
    assert torch.equal(losses.dlr(logits, y) > 0, wrong)


def test_other_classes_are_ranked_and_leave_out_the_true_one(drawn):
    logits, y = drawn
    found = losses.other_classes(logits, y, 5)
    for row, classes, true in zip(logits.tolist(), found.tolist(), y.tolist(), strict=True):
        assert classes == sorted((k for k in range(6) if k != true), key=lambda k, row=row: -row[k])
    assert torch.equal(losses.other_classes(logits, y, 2), found[:, :2])
