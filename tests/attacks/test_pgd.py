"""PGD: known answers on linear models, equality with torchattacks step for step, the loop used in training."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from synthfast.attacks import PGD, losses, pgd_maximize

EPS = {"linf": 0.1, "l2": 0.8}
STEP = {"linf": 0.025, "l2": 0.2}


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_reaches_the_best_point_for_two_linear_classes(draw_linear, norm, loss):
    model, images = draw_linear(100, classes=2)
    distance = model.distance(images.x, images.y, norm)
    eps = distance.median().item()
    result = PGD(norm, eps, steps=60, step_size=eps / 2, loss=loss).run(model, images.x, images.y)
    clear = (distance / eps - 1).abs() > 1e-3
    assert torch.equal(result.fooled[clear], (distance < eps)[clear])
    standing = ~result.fooled
    left = model.distance(result.images, images.y, norm)
    torch.testing.assert_close(left[standing], (distance - eps)[standing], rtol=0, atol=1e-5)


def test_reaches_the_corner_of_ball_and_box(draw_linear):
    """With pixels at the faces of the box, the best l-infinity point clips each pixel's move by itself."""
    model, images = draw_linear(60, classes=2, spread=1.0)
    down = (model.weight[images.y] - model.weight[1 - images.y]).sign().reshape(images.x.shape)
    best = (images.x.double() - 0.05 * down).clamp(0, 1)
    result = PGD("linf", 0.05, steps=20).run(model, images.x, images.y)
    standing = ~result.fooled
    assert 5 < standing.sum() < 55
    torch.testing.assert_close(result.images[standing].double(), best[standing], rtol=0, atol=1e-6)
    assert torch.equal(result.fooled, model(best).argmax(1) != images.y)


def test_targets_in_turn(draw_linear, norm):
    """All targets together break nearly all that the radius can reach: cross-entropy to a target also pulls away from third
    classes, so its best point is not quite the nearest wrong one."""
    model, images = draw_linear(100, classes=5)
    distance = model.distance(images.x, images.y, norm)
    eps = distance.median().item()
    options = {"steps": 40, "step_size": eps / 4, "loss": "targeted"}
    every = PGD(norm, eps, **options).run(model, images.x, images.y)
    one = PGD(norm, eps, targets=1, **options).run(model, images.x, images.y)
    assert not (every.fooled & (distance > eps)).any()
    assert every.fooled.sum() >= 0.8 * (distance < eps).sum()
    assert not (one.fooled & ~every.fooled).any()
    assert one.gradients < every.gradients


def test_number_of_targets(network, digits):
    """Images that hold cost a run for each target, all 9 unless told otherwise."""
    x = digits.x[:10]
    y = network(x).argmax(1)
    for targets, runs in ((1, 1), (4, 4), (None, 9), (100, 9)):
        result = PGD("linf", 1e-4, steps=2, loss="targeted", targets=targets).run(network, x, y)
        assert not result.fooled.any() and result.gradients == 10 * 2 * runs


def test_restarts_attack_only_what_stands(network, digits):
    x, y = digits.x[:300], digits.y[:300]
    one, four = (PGD("linf", 0.15, steps=5, restarts=n).run(network, x, y) for n in (1, 4))
    assert torch.equal(four.images[one.fooled], one.images[one.fooled])
    assert four.fooled.sum() > one.fooled.sum()
    standing = (~one.fooled).sum().item()
    assert four.gradients <= one.gradients + 3 * 5 * standing


def test_restarts_keep_the_strongest_try(network, digits):
    """Of images that hold, the result has the highest loss of the restarts."""
    x = digits.x[:100]
    y = network(x).argmax(1)

    def loss(images):
        return losses.cross_entropy(network(images).detach(), y)

    tries = [loss(PGD("linf", 0.03, steps=1, step_size=0.01, restarts=n)(network, x, y)) for n in (1, 2, 6)]
    held = ~PGD("linf", 0.03, steps=1, step_size=0.01, restarts=6).run(network, x, y).fooled
    assert held.sum() > 50
    for fewer, more in pairwise(tries):
        assert (more >= fewer - 1e-6)[held].all() and (more > fewer + 1e-6)[held].any()


def test_leaving_early_is_cheaper_and_breaks_no_less(network, digits):
    x, y = digits.x[:300], digits.y[:300]
    early, late = (PGD("linf", 0.15, stop_early=stop, random_start=False).run(network, x, y) for stop in (True, False))
    assert early.gradients < 0.8 * late.gradients
    assert early.fooled.sum() >= late.fooled.sum() > 50
    held = ~early.fooled & ~late.fooled
    torch.testing.assert_close(early.images[held], late.images[held], rtol=0, atol=1e-5)


def test_default_step_size_crosses_the_ball(network, digits):
    x, y = digits.x[:50], digits.y[:50]
    given = PGD("linf", 0.1, steps=10, step_size=0.025)(network, x, y)
    assert torch.equal(PGD("linf", 0.1, steps=10)(network, x, y), given)


class Scale(nn.Module):
    def forward(self, logits):
        return logits / 4


@pytest.fixture
def mild(network):
    """The network with flatter softmax: where it is sure of an image, float32 knows few digits of the gradient."""
    return nn.Sequential(network, Scale()).eval()


@pytest.fixture
def certain(mild, digits):
    """256 images with the network's own classes: none is left out, and the mean that torchattacks takes over the batch
    instead of the sum scales gradients by a power of two, which changes no digit."""
    x = digits.x[:256]
    return x, mild(x).argmax(1)


def torchattacks_pgd(norm, model, **options):
    torchattacks = pytest.importorskip("torchattacks")
    if norm == "l2":
        options["eps_for_division"] = (
            0  # added to the length of the gradient, which the mean over the batch makes small
        )
    return {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm](
        model, eps=EPS[norm], alpha=STEP[norm], steps=10, **options
    )


def test_equals_torchattacks_step_for_step(mild, certain, norm):
    x, y = certain
    found = PGD(norm, EPS[norm], steps=10, step_size=STEP[norm], random_start=False, stop_early=False)(mild, x, y)
    torch.testing.assert_close(found, torchattacks_pgd(norm, mild, random_start=False)(x, y), rtol=0, atol=1e-6)
    assert (mild(found).argmax(1) != y).float().mean() > 0.1


def test_equals_torchattacks_from_a_random_start(mild, certain, norm):
    x, y = certain
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = torchattacks_pgd(norm, mild, random_start=True)(x, y)
        torch.manual_seed(5)
        if norm == "linf":
            start = (x + torch.empty_like(x).uniform_(-EPS[norm], EPS[norm])).clamp(0, 1)
        else:
            normal = torch.empty_like(x).normal_()
            length = normal.flatten(1).norm(dim=1)[:, None, None, None]
            radius = torch.zeros_like(length).uniform_(0, 1)
            start = (x + normal * (radius / length * EPS[norm])).clamp(0, 1)
    found = pgd_maximize(
        lambda images: losses.cross_entropy(mild(images), y),
        start,
        x,
        norm=norm,
        eps=EPS[norm],
        step_size=STEP[norm],
        steps=10,
    )
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-6)


def test_equals_torchattacks_toward_the_second_class(mild, certain, norm):
    x, y = certain
    attack = torchattacks_pgd(norm, mild, random_start=False)
    attack.set_mode_targeted_by_label(quiet=True)
    second = mild(x).topk(2).indices[:, 1]
    options = {"loss": "targeted", "targets": 1, "random_start": False, "stop_early": False}
    found = PGD(norm, EPS[norm], steps=10, step_size=STEP[norm], **options)(mild, x, y)
    torch.testing.assert_close(found, attack(x, second), rtol=0, atol=1e-6)


class TestPgdMaximize:
    def test_same_as_the_attack(self, network, certain, norm):
        x, y = certain
        found = pgd_maximize(
            lambda images: losses.cross_entropy(network(images), y),
            x,
            x,
            norm=norm,
            eps=EPS[norm],
            step_size=STEP[norm],
            steps=5,
        )
        attack = PGD(norm, EPS[norm], steps=5, step_size=STEP[norm], random_start=False, stop_early=False)
        torch.testing.assert_close(found, attack(network, x, y), rtol=0, atol=1e-6)

    def test_radius_and_step_for_each_image(self, draw_linear, norm, assert_inside):
        model, images = draw_linear(6, classes=2)
        eps = torch.tensor([0.0, 0.01, 0.05, 0.1, 0.2, 0.3])
        size = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.05])
        found = pgd_maximize(
            lambda x: losses.cw_margin(model(x), images.y),
            images.x,
            images.x,
            norm=norm,
            eps=eps,
            step_size=size,
            steps=2,
        )
        moved = (found - images.x).flatten(1)
        lengths = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        torch.testing.assert_close(lengths, torch.tensor([0.0, 0.01, 0.05, 0.1, 0.2, 0.1]), rtol=1e-4, atol=1e-7)

    def test_inputs_and_parameters_are_untouched(self, norm):
        layer = nn.Linear(4, 3).train()
        x = torch.rand(5, 4, requires_grad=True)
        start = (x + 0.01).clamp(0, 1)
        before = x.detach().clone(), start.detach().clone()
        y = torch.zeros(5, dtype=torch.int64)
        found = pgd_maximize(
            lambda images: losses.cross_entropy(layer(images), y), start, x, norm=norm, eps=0.1, step_size=0.1, steps=3
        )
        assert torch.equal(x, before[0]) and torch.equal(start, before[1])
        assert x.grad is None and layer.weight.grad is None
        assert not found.requires_grad and not torch.equal(found, start)

    def test_no_steps_give_a_copy_of_the_start(self, norm):
        x = torch.rand(2, 1, 2, 2)
        found = pgd_maximize(lambda images: images.sum(), x, x, norm=norm, eps=0.1, step_size=0.1, steps=0)
        assert torch.equal(found, x) and found is not x

    def test_any_loss(self, norm):
        """The loss need not know classes: here the squared distance to white, which is minimized."""
        x = torch.full((3, 1, 2, 2), 0.5)
        found = pgd_maximize(
            lambda images: -(images - 1).square().flatten(1).sum(1), x, x, norm=norm, eps=0.1, step_size=0.05, steps=4
        )
        torch.testing.assert_close(found, x + (0.1 if norm == "linf" else 0.1 / math.sqrt(4)), rtol=0, atol=1e-6)
