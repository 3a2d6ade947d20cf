"""APGD: its schedule and rules on made-up losses, known answers on linear models, comparison with torchattacks."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from synthfast import ops
from synthfast.attacks import APGD, losses
from synthfast.attacks.apgd import checkpoints

EPS = {"linf": 0.12, "l2": 0.65}


@pytest.fixture(params=["linf", "l2"])
def norm(request):
    return request.param


def test_published_checkpoints():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 17, 50, 1000])
def test_checkpoints_of_any_number_of_steps(steps):
    found = checkpoints(steps)
    assert found[0] == 0 and found[-1] <= steps
    lengths = [after - before for before, after in pairwise(found)]
    assert min(lengths) >= 1
    assert steps < 50 or all(after <= before + 1 for before, after in pairwise(lengths))


class Valley:
    """A loss -|mean(x) - 0.6| for class 0, whose best images are known, and which class 0 always wins."""

    def __call__(self, x):
        height = -(x.flatten(1).mean(1) - 0.6).abs()
        return torch.stack([torch.ones_like(height), height], 1)


class Call(NamedTuple):
    step_size: torch.Tensor
    momentum: torch.Tensor
    x: torch.Tensor
    previous: torch.Tensor
    gradient: torch.Tensor


def recorded(monkeypatch):
    """What each call of the operation was given: step sizes, momenta, the iterate, the one before, its gradient."""
    calls = []
    real = ops.apgd_step_

    def spy(previous, x, gradient, origin, eps, step_size, momentum, norm):
        calls.append(Call(step_size.clone(), momentum.clone(), x.clone(), previous.clone(), gradient.clone()))
        return real(previous, x, gradient, origin, eps, step_size, momentum, norm)

    monkeypatch.setattr(ops, "apgd_step_", spy)
    return calls


def test_steps_halve_at_checkpoints_where_the_loss_swings(monkeypatch):
    """Around a ridge inside the ball, steps of 2 eps go back and forth: every checkpoint halves, and the best point returns."""
    calls = recorded(monkeypatch)
    x, y = torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, dtype=torch.int64)
    result = APGD("linf", 0.25, steps=100).run(Valley(), x, y)
    sizes = torch.stack([call.step_size for call in calls])
    assert len(calls) == 100
    assert torch.equal(sizes[:22], torch.full((22, 4), 0.5))
    changed = (sizes[1:] != sizes[:-1]).any(1).nonzero()[:, 0] + 1
    assert changed.tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    ratios = sizes[1:] / sizes[:-1]
    assert ratios.unique().tolist() == [0.5, 1.0] and sizes[-1].max() < 0.01
    # At a checkpoint that halved, the step starts from the best iterate so far.
    for k in (22, 41, 57):
        iterates = torch.stack([call.x for call in calls[: k + 1]]).flatten(2).mean(2)
        best = (iterates[:-1] - 0.6).abs().amin(0)
        halved = sizes[k] < sizes[k - 1]
        assert halved.any()
        torch.testing.assert_close((iterates[-1] - 0.6).abs()[halved], best[halved], rtol=0, atol=1e-6)
        # Its gradient comes back with it: every pixel points to the ridge.
        up = (0.6 - iterates[-1]).sign()[halved]
        assert torch.equal(calls[k].gradient.sign().flatten(1)[halved], up[:, None].expand(-1, 4))
    torch.testing.assert_close(result.images.flatten(1).mean(1), torch.full((4,), 0.6), rtol=0, atol=5e-3)


class Scripted:
    """Two classes whose margin follows a script, call by call, wherever the image is; class 0 always wins."""

    def __init__(self, margin):
        self.margin, self.calls = margin, -1

    def __call__(self, x):
        self.calls += 1
        nothing = 0 * x.flatten(1).sum(1)
        return torch.stack([nothing + self.margin(self.calls), nothing], 1)


def halvings(monkeypatch, margin):
    """Checkpoints at which 100 steps halve their size when the model is ``Scripted(margin)``."""
    calls = recorded(monkeypatch)
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    APGD("linf", 0.1).run(Scripted(margin), x, y)
    sizes = torch.cat([call.step_size for call in calls])
    assert len(sizes) == 100 and sizes[0].item() == pytest.approx(0.2)
    return ((sizes[1:] != sizes[:-1]).nonzero()[:, 0] + 1).tolist()


def test_steps_stay_while_the_loss_rises(monkeypatch):
    assert halvings(monkeypatch, lambda call: 5 - 0.04 * call) == []


def test_steps_halve_at_every_checkpoint_if_the_loss_falls(monkeypatch):
    assert halvings(monkeypatch, lambda call: 1 + 0.04 * call) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize(
    ("period", "phase", "expected"),
    [(3, 1, [22, 41, 57, 70, 80, 87, 93, 99]), (4, 3, [41, 57, 80, 87, 99])],
)
def test_condition_one_counts_rises(monkeypatch, period, phase, expected):
    """One step in three, or in four, lowers the loss, yet the best grows from checkpoint to checkpoint: condition 2 never holds.

    With one in four: 17 of 22, 14 of 19, 12 of 16 (three quarters exactly), 10 of 13, 7 of 10, 5 of 7, 5 of 6, 4 of 6 rise.
    """

    def margin(call):
        step = call - 1  # the first call comes before the attack, the second at the start
        return 5 - 0.02 * step + (step % period == phase)

    assert halvings(monkeypatch, margin) == expected


def test_condition_two_skips_a_checkpoint_after_a_halving(monkeypatch):
    """A saw of 9 rises and a fall, always to the same height: more than three quarters rise, but after the first checkpoint
    the best stays, and every other one halves."""
    assert halvings(monkeypatch, lambda call: 5 - 0.3 * (call % 10)) == [41, 70, 87, 99]


def test_momentum_begins_with_the_second_step(monkeypatch):
    calls = recorded(monkeypatch)
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    APGD("l2", 0.1, steps=4).run(Valley(), x, y)
    assert [call.momentum.unique().tolist() for call in calls] == [[1.0], [0.75], [0.75], [0.75]]
    assert torch.equal(calls[2].previous, calls[1].x)  # what was the iterate is the one before


class BrokenAtCheckpoint:
    """Three classes, 0 the true one, but at the image of the call ``at``: there class 1 wins, with a loss below all before."""

    def __init__(self, at):
        self.at, self.calls, self.found = at, -1, None

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            self.found = x.detach().clone()
        height = -0.01 * (x.flatten(1).mean(1) - 0.6).abs()  # a ridge, so that the iterates differ
        right = torch.stack([1 - height, 0.9 + height, 0.9 + height], 1)
        broken = torch.stack([1 - height, 1.5 + height, -5 + height], 1)
        if self.found is None:
            return right
        return torch.where((x == self.found).flatten(1).all(1)[:, None], broken, right)


@pytest.mark.parametrize("step", [2, 3, 5, 10])
def test_an_image_broken_at_a_checkpoint_is_not_given_up_for_the_best_iterate(step):
    """Cross-entropy may fall as a third class is left behind, and then a checkpoint (3 and 5 of 10 steps) goes back."""
    assert checkpoints(10)[1:3] == [3, 5]
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    model = BrokenAtCheckpoint(at=1 + step)  # calls: before the attack, at the start, after each step
    result = APGD("linf", 0.2, steps=10).run(model, x, y)
    assert torch.equal(result.images, model.found)
    assert result.fooled.all()


def test_reaches_the_best_point_for_two_linear_classes(draw_linear, norm):
    model, images = draw_linear(100, classes=2)
    distance = model.distance(images.x, images.y, norm)
    eps = distance.median().item()
    result = APGD(norm, eps).run(model, images.x, images.y)
    clear = (distance / eps - 1).abs() > 1e-3
    assert clear.sum() > 90
    assert torch.equal(result.fooled[clear], (distance < eps)[clear])
    standing = ~result.fooled
    left = model.distance(result.images, images.y, norm)
    torch.testing.assert_close(left[standing], (distance - eps)[standing], rtol=0, atol=1e-5)


def test_targets_find_the_nearest_class(draw_linear, norm):
    model, images = draw_linear(100, classes=5)
    distance = model.distance(images.x, images.y, norm)
    eps = distance.median().item()
    clear = (distance / eps - 1).abs() > 2e-3
    assert clear.sum() > 80
    result = APGD(norm, eps, loss="dlr", targets=9).run(model, images.x, images.y)
    assert torch.equal(result.fooled[clear], (distance < eps)[clear])


def test_an_image_that_holds_costs_one_gradient_a_step(network, digits):
    x = digits.x[:10]
    y = network(x).argmax(1)
    result = APGD("linf", 1e-4, steps=7, loss="dlr", targets=3, restarts=2).run(network, x, y)
    assert not result.fooled.any()
    assert result.gradients == 10 * 7 * 3 * 2
    assert result.queries == 10 * (8 * 3 * 2 + 1 + 1 + 1)  # before, for the targets, judging


def test_every_target_has_its_restarts(monkeypatch, network, digits):
    x = digits.x[:5]
    logits = network(x).detach()
    seen = []
    real = losses.dlr_targeted

    def spy(logits, y, target):
        seen.append(target.tolist())
        return real(logits, y, target)

    monkeypatch.setattr(losses, "dlr_targeted", spy)
    result = APGD("linf", 1e-4, steps=1, loss="dlr", targets=3, restarts=2).run(network, x, logits.argmax(1))
    assert not result.fooled.any()
    second, third, fourth = (logits.sort(dim=1, descending=True).indices[:, k].tolist() for k in (1, 2, 3))
    assert seen == 4 * [second] + 4 * [third] + 4 * [fourth]  # at the start and after the step of two runs each


def torchattacks_robust(network, x, y, norm, **options):
    """Per cent that hold against torchattacks' APGD, or APGDT without a loss."""
    torchattacks = pytest.importorskip("torchattacks")
    attack = torchattacks.APGD if "loss" in options else torchattacks.APGDT
    found = attack(network, norm={"linf": "Linf", "l2": "L2"}[norm], eps=EPS[norm], **options)(x, y)
    return 100 * (network(found).argmax(1) == y).float().mean().item()


def robust(attack, network, x, y):
    return 100 * (~attack.run(network, x, y).fooled).float().mean().item()


@pytest.mark.parametrize(("loss", "steps", "restarts"), [("ce", 100, 1), ("dlr", 50, 3)])
def test_as_strong_as_torchattacks(network, digits, norm, loss, steps, restarts):
    """Within a point of its robust accuracy, or below.

    One run of DLR depends on its start: on all 1,297 images, l2, the robust accuracies of 8 seeds have a standard deviation of
    0.4 points, ours and theirs alike, about means of 56.83 and 56.82 (56.78 with starts on the sphere, as theirs). So 3 runs.
    """
    x, y = digits.x[:400], digits.y[:400]
    ours = robust(APGD(norm, EPS[norm], loss=loss, steps=steps, restarts=restarts), network, x, y)
    theirs = torchattacks_robust(network, x, y, norm, steps=steps, loss=loss, n_restarts=restarts)
    assert ours <= theirs + 1
    assert 20 < ours < 90


def test_targets_as_strong_as_torchattacks(network, digits, norm):
    x, y = digits.x[:200], digits.y[:200]
    ours = robust(APGD(norm, EPS[norm], loss="dlr", targets=9, steps=30), network, x, y)
    theirs = torchattacks_robust(network, x, y, norm, steps=30)
    assert ours <= theirs + 1
    assert ours <= robust(APGD(norm, EPS[norm], loss="dlr", steps=30), network, x, y)
