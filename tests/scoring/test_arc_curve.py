"""Monotone fit, area and intervals of a success curve, against scikit-learn, sums by hand and a plain bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from synthfast.scoring.arc_curve import area, isotonic, measure_area


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_the_fit_is_that_of_pooling_adjacent_violators(n):
    rng = np.random.default_rng(n)
    values = rng.normal(size=(50, n))
    values[::5] = np.round(values[::5])  # ties
    expected = [IsotonicRegression(increasing=False).fit_transform(np.arange(n), row) for row in values]
    assert np.allclose(isotonic(values), expected, atol=1e-12)
    assert np.allclose(isotonic(values.reshape(5, 10, n)), isotonic(values).reshape(5, 10, n))


def test_a_monotone_curve_stays():
    values = np.array([0.9, 0.8, 0.8, 0.6, 0.4])
    assert np.allclose(isotonic(values), values)


def test_the_area_is_that_above_chance_by_the_trapezoid_rule():
    eps = np.array([0.0, 1.0, 3.0, 4.0])
    assert area(eps, np.array([0.9, 0.7, 0.6, 0.5])) == pytest.approx(0.3 * 1 + 0.15 * 2 + 0.05 * 1)
    assert area(eps, np.array([0.9, 0.7, 0.4, 0.1])) == pytest.approx(0.3 * 1 + 0.1 * 2)  # 1/2 in the place of less
    assert np.allclose(area(eps, np.array([[1.0] * 4, [0.5] * 4, [0.0] * 4])), [2, 0, 0])


def outcomes(shares, images, seed):
    """Outcomes of nested events: an image that stands at a radius stands at the smaller ones."""
    uniform = np.random.default_rng(seed).random(images)
    return (uniform[None] < np.array(shares)[:, None]).astype(np.float64)


EPS = (0.0, 0.1, 0.2, 0.4)


def test_the_curve_and_its_area():
    real, synthetic = outcomes([0.9, 0.6, 0.7, 0.2], 200, 0), outcomes([1.0, 0.8, 0.6, 0.3], 200, 1)
    found = measure_area(EPS, real, synthetic, draws=300, seed=0)
    raw = (real.mean(1) + synthetic.mean(1)) / 2
    assert np.allclose(found.accuracy, raw)
    assert np.allclose(found.fitted, isotonic(raw))
    assert found.value == pytest.approx(area(np.array(EPS), isotonic(raw)))
    assert found.floored.tolist() == [False, False, False, True]
    assert found.ci[0] < found.value < found.ci[1]


def test_kinds_of_different_sizes_weigh_the_same():
    real, synthetic = np.ones((2, 10)), np.zeros((2, 1000))
    assert measure_area((0.0, 1.0), real, synthetic, draws=100, seed=0).accuracy.tolist() == [0.5, 0.5]


def test_the_interval_is_that_of_a_plain_bootstrap():
    real, synthetic = outcomes([0.9, 0.7, 0.6, 0.2], 150, 2), outcomes([1.0, 0.8, 0.5, 0.3], 170, 3)
    found = measure_area(EPS, real, synthetic, draws=4000, seed=1)
    rng, areas, raws = np.random.default_rng(5), [], []
    for _ in range(4000):
        a = real[:, rng.integers(0, 150, 150)].mean(1)
        b = synthetic[:, rng.integers(0, 170, 170)].mean(1)
        raws.append((a + b) / 2)
        areas.append(area(np.array(EPS), isotonic(raws[-1])))
    width = np.ptp(np.percentile(areas, [2.5, 97.5]))
    assert np.allclose(found.ci, np.percentile(areas, [2.5, 97.5]), atol=0.06 * width)
    assert np.allclose(found.accuracy_ci, np.percentile(raws, [2.5, 97.5], axis=0).T, atol=0.01)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    shares, truth = [0.9, 0.8, 0.65, 0.55], area(np.array(EPS), np.array([0.9, 0.8, 0.65, 0.55]))
    covered = 0
    for seed in range(100):
        real, synthetic = outcomes(shares, 200, 2 * seed), outcomes(shares, 200, 2 * seed + 1)
        low, high = measure_area(EPS, real, synthetic, draws=200, seed=seed).ci
        covered += low <= truth <= high
    assert 88 <= covered <= 99


def test_the_draws_depend_on_the_seed_alone():
    real, synthetic = outcomes([0.9, 0.7, 0.6, 0.2], 50, 4), outcomes([1.0, 0.8, 0.5, 0.3], 50, 5)
    first, second, other = (measure_area(EPS, real, synthetic, draws=130, seed=seed) for seed in (7, 7, 8))
    assert first.ci == second.ci != other.ci
    assert measure_area(EPS, real, synthetic, draws=130, seed=-1).ci[0] > 0


def test_a_curve_at_chance_has_no_area_and_no_width():
    half = np.full((3, 40), 0.5)
    found = measure_area((0.0, 1.0, 2.0), half, half, draws=100, seed=0)
    assert (found.value, found.ci) == (0.0, (0.0, 0.0)) and not found.floored.any()
