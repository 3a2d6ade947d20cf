"""Rank correlations: against scipy, and intervals whose meaning is checked on made scores."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from synthfast.evaluation.interval import mean_interval
from synthfast.scoring.correlation import Measured, rank_correlations, spearman


def measured(values, error=0.0):
    return Measured(np.array(values, float), np.full(len(values), error))


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties):
    random = np.random.default_rng(5)
    a = random.integers(0, 4, (20, 9)) if ties else random.standard_normal((20, 9))
    b = random.integers(0, 4, (20, 9)) if ties else random.standard_normal((20, 9))
    expected = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-12)


def test_a_constant_score_has_no_correlation():
    assert spearman(np.zeros(5), np.arange(5)) == 0


def test_entries_of_results():
    score = Measured.of([{"value": 2.0, "ci": [2 - 1.959964, 2 + 1.959964]}, {"value": 1.0, "ci": None}])
    assert score.values.tolist() == [2, 1]
    np.testing.assert_allclose(score.errors, [1, 0])
    mean = mean_interval([0.5, 0.6, 0.7])
    np.testing.assert_allclose(Measured.of([mean], 2).errors, [0.1 / np.sqrt(3)], rtol=1e-3)


def test_exact_p():
    """Of the 720 orders of six, one gives rho 1 and one -1."""
    found = rank_correlations({"arc": measured([6, 5, 4, 3, 2, 1])}, measured([1, 2, 3, 4, 5, 6]), draws=50)["arc"]
    assert found["value"] == -1
    assert found["p"] == pytest.approx(2 / 720)
    assert found["count"] == 6
    independent = rank_correlations({"s": measured([1, 3, 2, 2.5])}, measured([1, 2, 3, 4]), draws=50)["s"]
    expected = scipy.stats.spearmanr([1, 3, 2, 2.5], [1, 2, 3, 4]).statistic
    assert independent["value"] == pytest.approx(expected)
    assert independent["p"] > 0.3


def test_p_of_many_generators():
    random = np.random.default_rng(0)
    a = random.standard_normal(12)
    b = a + random.standard_normal(12)
    found = rank_correlations({"s": measured(a)}, measured(b), draws=50)["s"]
    assert found["p"] == pytest.approx(scipy.stats.spearmanr(a, b).pvalue, abs=0.02)


def test_errors_of_measurement_widen_the_interval():
    values, target = [1, 2, 3, 4, 5, 6, 7], measured([1, 2, 3, 4, 5, 6, 7])
    certain = rank_correlations({"s": measured(values)}, target)["s"]
    assert certain["ci"] == [1, 1]
    noisy = rank_correlations({"s": measured(values, error=2.0)}, target)["s"]
    assert noisy["ci"][0] < 0.7
    rough_target = rank_correlations({"s": measured(values)}, measured(target.values, error=2.0))["s"]
    assert rough_target["ci"][0] < 0.7


def test_difference_is_paired():
    """Two scores with the same order differ by nothing in every draw; a better one is told from a worse one."""
    target = measured([1, 2, 3, 4, 5, 6, 7])
    scores = {
        "good": measured([1, 2, 3, 4, 5, 6, 7.5]),
        "same": measured([2, 3, 4, 5, 6, 7, 9]),
        "reversed": measured([7, 6, 5, 4, 3, 2, 1]),
        "bad": measured([4, 1, 6, 2, 7, 3, 5]),
    }
    found = rank_correlations(scores, target)["good"]["magnitude_minus"]
    assert found["same"] == {"value": 0, "ci": [0, 0]}
    assert found["reversed"] == {"value": pytest.approx(0), "ci": [pytest.approx(0, abs=1e-12)] * 2}
    assert found["bad"]["value"] > 0.5 and found["bad"]["ci"][0] > -0.05
    assert set(found) == {"same", "reversed", "bad"}


def test_interval_covers_the_truth():
    """Generators from a bivariate normal: the 95% interval holds the true rho in most of 60 worlds (bootstrap, n = 20)."""
    random = np.random.default_rng(1)
    rho = 0.6
    true = 6 / np.pi * np.arcsin(rho / 2)
    inside = 0
    for _ in range(60):
        a = random.standard_normal(20)
        b = rho * a + np.sqrt(1 - rho**2) * random.standard_normal(20)
        low, high = rank_correlations({"s": measured(a)}, measured(b), draws=300)["s"]["ci"]
        inside += low <= true <= high
    assert inside >= 51


def test_same_seed_same_result():
    random = np.random.default_rng(2)
    scores, target = {"s": measured(random.standard_normal(9), 0.5)}, measured(random.standard_normal(9), 0.5)
    assert rank_correlations(scores, target, seed=3) == rank_correlations(scores, target, seed=3)
    assert rank_correlations(scores, target, seed=3) != rank_correlations(scores, target, seed=4)
