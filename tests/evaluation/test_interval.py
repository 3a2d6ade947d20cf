from __future__ import annotations

import math

import numpy as np
import pytest

from synthfast.evaluation.interval import mean_interval, share, t_quantile, wilson_interval


# From tables of Student's distribution.
@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (4, 2.776), (30, 2.042), (31, 2.040), (40, 2.021), (100, 1.984), (10**6, 1.960)],
)
def test_quantiles_of_t(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1e-3)


def test_the_interval_of_a_mean():
    values = [0.1, 0.3, 0.2, 0.2, 0.2]
    found = mean_interval(values)
    half = 2.7764 * np.std(values, ddof=1) / math.sqrt(5)
    assert found["value"] == pytest.approx(0.2) and found["count"] == 5
    assert found["ci"] == pytest.approx([0.2 - half, 0.2 + half])
    assert mean_interval([0.4]) == {"value": 0.4, "ci": None, "count": 1}


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(2000):
        low, high = mean_interval(random.normal(3, 2, 5).tolist())["ci"]
        hits += low <= 3 <= high
    assert 0.935 < hits / 2000 < 0.965


def test_a_share():
    assert share(np.array([True, False, True, True])) == {"value": 0.75, "ci": wilson_interval(3, 4), "count": 4}
