"""Outcomes of the measuring attack on networks whose robust success is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from synthfast.models.frozen import freeze
from synthfast.scoring.arc_measure import MarginAPGD, MeasureSettings, Outcomes, measure

WEIGHTS = torch.linspace(-1, 1, 16)


class Known(nn.Module):
    """margin = scale (w . x - b): logits (0, margin), class 1 where it is positive."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x):
        margin = self.scale * ((x.flatten(1) - 0.5) @ WEIGHTS)
        return torch.stack([torch.zeros_like(margin), margin], 1)


def images(seed: int, shift: float) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    x = 0.5 + shift * WEIGHTS.numpy() + 0.06 * rng.standard_normal((300, 16))
    return torch.from_numpy(np.rint(255 * x).clip(0, 255).astype(np.uint8).reshape(300, 4, 4, 1))


REAL, SYNTHETIC = images(0, 0.01), images(1, -0.01)


def distances(pixels: torch.Tensor, norm: str) -> np.ndarray:
    """How far each image is from the boundary, positive on the side of class 1; pixel bounds are out of reach."""
    margin = ((pixels.reshape(len(pixels), 16).double() / 255 - 0.5) @ WEIGHTS.double()).numpy()
    dual = WEIGHTS.double().norm() if norm == "l2" else WEIGHTS.double().abs().sum()
    return margin / float(dual)


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.0), ("l2", 0.04), ("linf", 0.01)])
def test_outcomes_are_exact_for_a_linear_network(norm, eps):
    found = measure(freeze(Known()), REAL, SYNTHETIC, eps, norm, MeasureSettings(steps=10))
    right = found.right()
    expected = distances(REAL, norm) > eps, distances(SYNTHETIC, norm) < -eps
    for ours, theirs, pixels in zip(right, expected, (REAL, SYNTHETIC), strict=True):
        sure = np.abs(np.abs(distances(pixels, norm)) - eps) > 1e-4
        assert (ours == theirs)[sure].all() and sure.mean() > 0.95
    assert found.success() == pytest.approx((right[0].mean() + right[1].mean()) / 2)
    assert found.runs == (0 if eps == 0 else 2)


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_batch_size_changes_nothing(batch_size):
    settings = MeasureSettings(steps=3, restarts=2, batch_size=batch_size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    small, large = (
        measure(freeze(network), REAL[:60], SYNTHETIC[:60], 0.05, "l2", s)
        for s in (settings, MeasureSettings(steps=3, restarts=2, batch_size=60))
    )
    assert (small.real == large.real).all() and (small.synthetic == large.synthetic).all()


def test_a_margin_that_cross_entropy_cannot_see_is_attacked():
    """With margins of thousands the gradient of cross-entropy is 0 in float32."""
    sure = freeze(Known(1e6))
    found = measure(sure, REAL, SYNTHETIC, 0.04, "l2", MeasureSettings(steps=10))
    plain = measure(freeze(Known()), REAL, SYNTHETIC, 0.04, "l2", MeasureSettings(steps=10))
    assert (found.right()[0] == plain.right()[0]).all() and (found.right()[1] == plain.right()[1]).all()
    assert MarginAPGD("l2", 0.1).classes_needed == 2


def test_runs_are_counted_and_a_later_one_starts_elsewhere():
    """A network that can be fooled only in a corner that few starts lie in: each run finds some more."""

    class Corner(nn.Module):
        def forward(self, x):
            x = x.flatten(1)
            inside = (x[:, :2] - 0.5).relu().prod(1) * 100 - 0.15
            return torch.stack([inside, -inside], 1)

    grey = torch.full((200, 2, 2, 1), 127, dtype=torch.uint8)
    # Class 0 has the higher logit in the corner: images of class 1, the real ones, are fooled by it.
    found = measure(freeze(Corner()), grey, grey, 0.1, "linf", MeasureSettings(steps=1, restarts=3))
    shares = [found.right(runs)[0].mean() for runs in range(4)]
    assert shares[0] == 1 and shares[0] > shares[1] > shares[2] > shares[3] > 0
    assert set(np.unique(found.real)) == set(range(1, found.runs + 2)) and set(np.unique(found.synthetic)) == {0}
    assert [found.success(runs) for runs in range(4)] == pytest.approx([share / 2 for share in shares])
    # Each run still finds some, so that more follow than were asked for.
    assert 3 < found.runs <= 9
    lost = [found.success(runs - 1) - found.success(runs) for runs in range(1, found.runs + 1)]
    assert min(lost[2:-1]) > 0.002 and (found.runs == 9 or lost[-1] <= 0.002)
    assert measure(freeze(Corner()), grey, grey, 0.1, "linf", MeasureSettings(steps=1, restarts=1)).runs == 1


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
def test_any_seed_will_do(seed):
    found = measure(freeze(Known()), REAL, SYNTHETIC, 0.04, "l2", MeasureSettings(steps=5, seed=seed))
    assert found.success() == measure(freeze(Known()), REAL, SYNTHETIC, 0.04, "l2", MeasureSettings(steps=5)).success()


def test_outcomes_after_fewer_runs():
    found = Outcomes(np.array([0, 1, 2, 3], np.uint8), np.array([3, 3, 3, 0], np.uint8), 2)
    assert [found.success(runs) for runs in (0, 1, 2)] == [0.75, 0.625, 0.5]
    assert found.success() == 0.5


def test_work_that_nobody_waits_for_ends():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(freeze(Known()), REAL, SYNTHETIC, 0.04, "l2", MeasureSettings(), stop)
