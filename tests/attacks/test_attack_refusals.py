"""What must raise, each with a line that says what to do."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from synthfast.attacks import APGD, FGSM, PGD, pgd_maximize
from synthfast.errors import UsageError

X, Y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])


def model(x, classes=5):
    return x.flatten(1).sum(1, keepdim=True) * torch.zeros(classes) + torch.nn.functional.one_hot(Y[: len(x)], classes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FGSM("l1", 0.1), "norm must be linf or l2, found 'l1'"),
        (lambda: FGSM("linf", -0.1), "eps must be a finite number >= 0 .* found -0.1"),
        (lambda: FGSM("linf", float("nan")), "eps must be a finite number"),
        (lambda: FGSM("linf", float("inf")), "eps must be a finite number"),
        (lambda: FGSM("linf", "8/255"), "eps must be a finite number .* found '8/255'"),
        (lambda: PGD("linf", 0.1, steps=0), "steps must be 1 or more, found 0"),
        (lambda: PGD("linf", 0.1, step_size=0.0), "step_size must be a finite number > 0"),
        (lambda: PGD("linf", 0.1, step_size=float("nan")), "step_size must be a finite number > 0"),
        (lambda: PGD("linf", 0.1, restarts=0), "restarts must be 1 or more, found 0"),
        (lambda: PGD("linf", 0.1, restarts=2, random_start=False), "restarts without random_start"),
        (lambda: PGD("linf", 0.1, loss="dlr"), "loss must be one of ce, cw, targeted, found 'dlr'"),
        (lambda: PGD("linf", 0.1, targets=3), "targets must be 1 or more, with loss targeted, found 3 with ce"),
        (lambda: PGD("linf", 0.1, loss="targeted", targets=0), "targets must be 1 or more"),
        (lambda: APGD("linf", 0.1, steps=0), "steps must be 1 or more, found 0"),
        (lambda: APGD("linf", 0.1, loss="cw"), "loss must be ce or dlr, found 'cw'"),
        (lambda: APGD("linf", 0.1, targets=-1), "targets must be 0 .* found -1"),
        (lambda: APGD("linf", 0.1, restarts=0), "restarts must be 1 or more"),
        (
            lambda: pgd_maximize(lambda x: x, X, X, norm="l1", eps=0.1, step_size=0.1, steps=1),
            "norm must be linf or l2",
        ),
    ],
)
def test_settings(make, message):
    check(make, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.double(), Y), r"x must be images, float32, .* found torch.float64 \[2, 1, 2, 2\]"),
        ((X[:, 0, 0, 0], Y), r"x must be images, .* found torch.float32 \[2\]"),
        (((X * 255).to(torch.uint8), Y), "x must be images, .* found torch.uint8"),
        ((X * 2.5, Y), r"x must lie in \[0, 1\], found \[1.25, 1.25\]; put normalisation into the model"),
        ((X - 0.6, Y), r"x must lie in \[0, 1\]"),
        ((X * float("nan"), Y), r"x must lie in \[0, 1\], found \[nan, nan\]"),
        ((X, Y.int()), r"y must be int64 \[2\] on cpu like x, found torch.int32 \[2\] on cpu"),
        ((X, Y[:1]), r"y must be int64 \[2\] .* found torch.int64 \[1\]"),
        ((X, Y + 4), r"y must lie in \[0, 4\], the classes of the model, found \[4, 5\]"),
        ((X, Y - 1), r"y must lie in \[0, 4\], the classes of the model, found \[-1, 0\]"),
        ((X, Y, torch.arange(3)), r"index must be int64 \[2\]"),
        ((X, Y, torch.arange(2.0)), r"index must be int64 \[2\] .* found torch.float32"),
    ],
)
def test_inputs(arguments, message):
    check(lambda: FGSM("linf", 0.1)(model, *arguments), message)


@pytest.mark.parametrize(
    ("attack", "classes", "message"),
    [
        (
            APGD("linf", 0.1, loss="dlr"),
            2,
            "APGD with this loss needs 3 or more classes, the model has 2; use the loss ce",
        ),
        (APGD("linf", 0.1, loss="dlr", targets=9), 3, "needs 4 or more classes, the model has 3"),
        (PGD("linf", 0.1), 1, r"logits, float \[2, classes\] of 2 or more classes, found torch.float32 \[2, 1\]"),
    ],
)
def test_too_few_classes(attack, classes, message):
    few = torch.zeros(2, dtype=torch.int64)
    check(lambda: attack(lambda x: model(x, 5)[:, :classes], X, few), message)


@pytest.mark.parametrize(
    "attack", [APGD("linf", 0.1, loss="dlr"), APGD("linf", 0.1, targets=9), PGD("l2", 0.1, loss="targeted")]
)
def test_just_enough_classes(attack):
    assert attack(lambda x: model(x, attack.classes_needed), X, Y).shape == X.shape


@pytest.mark.parametrize(
    "logits", [torch.zeros(2, 3, 1), torch.zeros(3, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2)]
)
def test_outputs_that_are_not_logits(logits):
    check(lambda: FGSM("linf", 0.1)(lambda x: logits, X, Y), r"the model must give logits, float \[2, classes\]")


def test_a_model_in_training_mode():
    layer = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    check(lambda: FGSM("linf", 0.1)(layer, X, Y), r"the model is in training mode, .* call model.eval\(\)")
    layer.eval()
    layer[1].train()
    check(lambda: FGSM("linf", 0.1)(layer, X, Y), "the model is in training mode")
    layer.eval()
    FGSM("linf", 0.1)(layer, X, Y)


@pytest.mark.parametrize("attack", [FGSM("linf", 0.1), PGD("l2", 0.1), APGD("linf", 0.1)])
@pytest.mark.parametrize("cut", [lambda x: model(x.detach()), lambda x: model(x).detach(), torch.no_grad()(model)])
def test_a_model_without_gradients(attack, cut):
    check(lambda: attack(cut, X, Y), "the model gives no gradient for its input, .* remove no_grad and detach")


def test_a_parameterised_model_without_gradients_for_its_input():
    layer = nn.Linear(4, 3)
    bias = torch.tensor([[9.0, 0, 0], [0, 9, 0]])
    check(
        lambda: PGD("l2", 0.1)(lambda x: layer(x.detach().flatten(1)) + bias, X, Y), "gives no gradient for its input"
    )


def check(call, message):
    with pytest.raises(UsageError) as caught:
        call()
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
