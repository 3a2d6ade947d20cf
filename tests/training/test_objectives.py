"""Objectives against plain versions written here from the papers' equations, in float64 and one image at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from synthfast import ops
from synthfast.training.objectives import (
    Ball,
    cross_entropy,
    kl_divergence,
    pgd_images,
    trades_images,
    trades_loss,
)

SEED = 5


def softmax(logits):
    exponentials = [math.exp(float(z) - float(logits.max())) for z in logits]
    return [e / sum(exponentials) for e in exponentials]


def plain_ce(logits, targets, smoothing):
    total = 0.0
    for z, t in zip(logits, targets, strict=True):
        p, classes = softmax(z), len(z)
        target = [float(k == t) for k in range(classes)] if t.dim() == 0 else t.tolist()
        target = [(1 - smoothing) * share + smoothing / classes for share in target]
        total -= sum(share * math.log(q) for share, q in zip(target, p, strict=True))
    return total / len(logits)


def plain_kl(logits, other):
    return [
        sum(p * math.log(p / q) for p, q in zip(softmax(a), softmax(b), strict=True))
        for a, b in zip(logits, other, strict=True)
    ]


@pytest.fixture
def logits(generator):
    return torch.randn(7, 4, generator=generator) * 3, torch.randn(7, 4, generator=generator) * 3


TARGETS = {
    "classes": torch.tensor([0, 1, 2, 3, 3, 0, 1]),
    "shares": torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])[
        torch.tensor([0, 1, 2, 0, 1, 2, 2])
    ],
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(logits, kind, smoothing):
    found = cross_entropy(logits[0], TARGETS[kind], smoothing)
    assert float(found) == pytest.approx(plain_ce(logits[0], TARGETS[kind], smoothing), rel=1e-5)


def test_divergence_is_of_the_second_from_the_first(logits):
    assert kl_divergence(*logits).tolist() == pytest.approx(plain_kl(*logits), rel=1e-4, abs=1e-6)
    assert kl_divergence(logits[0], logits[0]).abs().max() < 1e-6
    assert kl_divergence(*logits).tolist() != pytest.approx(plain_kl(*logits[::-1]), rel=0.1)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("beta", "smoothing"), [(6.0, 0.0), (5.0, 0.1), (0.0, 0.0)])
def test_trades(logits, kind, beta, smoothing):
    """CE of the clean images, and the divergence as a mean over images, not over images and classes."""
    clean, adversarial = logits
    expected = plain_ce(clean, TARGETS[kind], smoothing) + beta * sum(plain_kl(clean, adversarial)) / 7
    assert float(trades_loss(clean, adversarial, TARGETS[kind], beta, smoothing)) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_trades_goes_through_clean_and_attacked_images(logits):
    """With p = softmax(a), q = softmax(b): d/db KL(p || q) = q - p, d/da KL(p || q) = p (log p/q - KL)."""
    clean, adversarial = (z.clone().requires_grad_() for z in logits)
    labels, beta = TARGETS["classes"], 3.0
    trades_loss(clean, adversarial, labels, beta).backward()
    p, q = clean.detach().double().softmax(1), adversarial.detach().double().softmax(1)
    divergence = (p * (p / q).log()).sum(1, keepdim=True)
    right = torch.nn.functional.one_hot(labels, 4)
    torch.testing.assert_close(adversarial.grad.double(), beta * (q - p) / 7, rtol=1e-4, atol=1e-6)
    expected = (p - right + beta * p * ((p / q).log() - divergence)) / 7
    torch.testing.assert_close(clean.grad.double(), expected, rtol=1e-4, atol=1e-6)


def test_losses_of_bfloat16_logits_are_computed_in_float32(logits):
    coarse = [z.bfloat16() for z in logits]
    expected = trades_loss(*(z.float() for z in coarse), TARGETS["classes"], 6.0)
    assert trades_loss(*coarse, TARGETS["classes"], 6.0) == expected and expected.dtype == torch.float32


@pytest.fixture
def network(generator):
    """A smooth function of the images, with parameters that an attack must leave alone."""
    torch.manual_seed(int(torch.randint(1000, (1,), generator=generator)))
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.fixture
def images(generator):
    x = torch.rand(6, 3, 2, 2, generator=generator).contiguous(memory_format=torch.channels_last)
    return x, torch.tensor([0, 1, 2, 3, 0, 1]), torch.arange(40, 46)


def plain_attack(loss, start, x, ball):
    """Projected gradient ascent as the papers write it."""
    found = start.clone()
    for _ in range(ball.steps):
        leaf = found.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        if ball.norm == "linf":
            found = found + ball.step_size * gradient.sign()
            found = torch.max(torch.min(found, x + ball.eps), x - ball.eps)
        else:
            found = found + ball.step_size * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = found - x
            length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            found = x + delta * (ball.eps / length).clamp(max=1)
        found = found.clamp(0, 1)
    return found


# At the start of TRADES q is nearly p, so that q - p has few exact digits left and with it the gradient's direction.
TRADES_TOLERANCE = {"linf": 2e-6, "l2": 1e-3}
BALLS = [Ball("linf", 0.1, 0.03, 4), Ball("l2", 0.5, 0.2, 4)]


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_pgd_climbs_the_cross_entropy_from_a_uniform_start(network, images, ball):
    x, y, index = images
    start = ops.ball_start(x, index, ball.eps, ball.norm, SEED)
    expected = plain_attack(lambda z: nn.functional.cross_entropy(network(z), y, reduction="sum"), start, x, ball)
    found = pgd_images(network, x, y, index, SEED, ball)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert cross_entropy(network(found), y) > cross_entropy(network(start), y) > 0


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
def test_trades_climbs_the_divergence_from_a_little_noise(network, images, ball):
    x, _, index = images
    noise = ops.philox_normal_(torch.empty_like(x), index, SEED, ops.Stream.ATTACK)
    start = (x + 0.001 * noise).clamp(0, 1)
    with torch.no_grad():
        p = network(x).softmax(1)
    expected = plain_attack(lambda z: (p * (p.log() - network(z).log_softmax(1))).sum(), start, x, ball)
    found = trades_images(network, x, index, SEED, ball)
    torch.testing.assert_close(found, expected, rtol=0, atol=TRADES_TOLERANCE[ball.norm])
    assert (start - x).abs().max() < 0.006
    assert (kl_divergence(network(x), network(found)) > 10 * kl_divergence(network(x), network(start))).all()


@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: ball.norm)
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_an_attack_depends_on_each_image_and_its_index_alone(network, images, ball, method):
    x, y, index = images

    def attack(rows, seed=SEED, stage=0):
        if method == "pgd":
            return pgd_images(network, x[rows], y[rows], index[rows], seed, ball, stage=stage)
        return trades_images(network, x[rows], index[rows], seed, ball)

    whole, some = attack(torch.arange(6)), torch.tensor([4, 1])
    tolerance = TRADES_TOLERANCE[ball.norm] if method == "trades" else 2e-6
    torch.testing.assert_close(attack(some), whole[some], rtol=0, atol=tolerance)
    index = index + 1000
    torch.testing.assert_close(attack(some), attack(torch.arange(6))[some], rtol=0, atol=tolerance)
    assert (attack(torch.arange(6)) - whole).abs().max() > 5 * tolerance
    index = index - 1000
    assert not torch.equal(attack(torch.arange(6), seed=6), whole)
    if method == "pgd":
        assert not torch.equal(attack(torch.arange(6), stage=1), whole)
    distance = (whole - x).double()
    size = distance.abs().amax() if ball.norm == "linf" else distance.flatten(1).norm(dim=1).amax()
    assert 0.5 * ball.eps < size <= ball.eps * (1 + 1e-6)
    assert whole.min() >= 0 and whole.max() <= 1
    assert all(parameter.grad is None for parameter in network.parameters()) and not whole.requires_grad


def test_soft_targets_are_attacked_as_such(network, images):
    """Attacking half of one class and half of another is neither of the attacks on one class."""
    x, y, index = images
    ball = Ball("l2", 0.5, 0.2, 3)
    soft = 0.5 * nn.functional.one_hot(y, 4) + 0.5 * nn.functional.one_hot((y + 1) % 4, 4)
    found = pgd_images(network, x, soft, index, SEED, ball)
    start = ops.ball_start(x, index, ball.eps, ball.norm, SEED)
    expected = plain_attack(lambda z: -(soft * network(z).log_softmax(1)).sum(), start, x, ball)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (found - pgd_images(network, x, y, index, SEED, ball)).abs().max() > 0.01
