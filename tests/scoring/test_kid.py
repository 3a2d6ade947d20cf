"""KID against its definition and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from synthfast.errors import UsageError
from synthfast.scoring import kid as module
from synthfast.scoring.kid import Parted, kid, kid_subsets


def parted(features: torch.Tensor, parts: int = 12, seed: int = 0) -> Parted:
    order = np.random.default_rng(seed).permutation(len(features))
    return Parted(features, order % parts)


def by_definition(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    n, m, dim = len(x), len(y), x.shape[1]
    xx, yy, xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(same - 2 * xy.mean())


def made(n: int, m: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, dim, generator=generator), torch.randn(m, dim, generator=generator) * 1.1 + 0.1


@pytest.mark.parametrize("block", [2048, 7])
@pytest.mark.parametrize(("n", "m", "dim"), [(24, 24, 3), (100, 57, 20), (57, 100, 1)])
def test_every_pair_counts_once(monkeypatch, generator, block, n, m, dim):
    monkeypatch.setattr(module, "_BLOCK", block)
    x, y = made(n, m, dim, generator)
    found = kid(parted(x), parted(y), 12)
    assert found["value"] == pytest.approx(by_definition(x, y), rel=1e-10)
    assert found["count"] == m and found["ci"][0] < found["value"] < found["ci"][1]


def test_replicates_leave_a_part_out(generator):
    x, y = made(40, 50, 5, generator)
    one, two = parted(x, 4), parted(y, 4)
    replicates = [by_definition(x[one.part != part], y[two.part != part]) for part in range(4)]
    expected = module.jackknife_interval(by_definition(x, y), replicates)
    assert kid(one, two, 4)["ci"] == pytest.approx(expected, rel=1e-9)


def test_equal_to_torch_fidelity_with_the_same_subsets(generator):
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = made(300, 250, 64, generator)
    settings = {"kid_subsets": 6, "kid_subset_size": 100, "rng_seed": 11, "verbose": False}
    expected = fidelity.kid_features_to_metric(x.double(), y.double(), **settings)
    found = kid_subsets(x, y, size=100, count=6, seed=11)
    assert found.mean() == pytest.approx(expected[fidelity.KEY_METRIC_KID_MEAN], rel=1e-9)
    assert found.std() == pytest.approx(expected[fidelity.KEY_METRIC_KID_STD], rel=1e-9)
    single = fidelity.kid_features_to_metric(x, y, **settings)[fidelity.KEY_METRIC_KID_MEAN]
    assert found.mean() == pytest.approx(single, rel=1e-4)
    # The mean over subsets estimates what all images give at once.
    many = kid_subsets(x, y, size=100, count=300)
    assert many.mean() == pytest.approx(by_definition(x, y), abs=4 * many.std() / 300**0.5)


def test_intervals_hold_the_truth():
    """N(0, 1) against N(1/2, 1) in one dimension: E[(xy + 1)^3] from moments; 95% intervals in 80 worlds."""
    random = np.random.default_rng(0)
    normal, shifted = (1, 0, 1, 0), (1, 0.5, 1.25, 0.5**3 + 3 * 0.5)  # moments 0 to 3
    kernel = lambda a, b: sum(c * p * q for c, p, q in zip((1, 3, 3, 1), a, b, strict=True))  # noqa: E731
    true = kernel(normal, normal) + kernel(shifted, shifted) - 2 * kernel(normal, shifted)
    values, held = [], 0
    for _ in range(80):
        x = torch.from_numpy(random.standard_normal((300, 1)))
        y = torch.from_numpy(random.standard_normal((400, 1)) + 0.5)
        found = kid(parted(x), parted(y), 12)
        values.append(found["value"])
        held += found["ci"][0] <= true <= found["ci"][1]
    assert held >= 70
    assert np.mean(values) == pytest.approx(true, abs=4 * np.std(values) / 80**0.5)


def test_equal_distributions_give_zero_on_average():
    random = np.random.default_rng(1)
    values = []
    for _ in range(60):
        x, y = (torch.from_numpy(random.standard_normal((60, 8))) for _ in range(2))
        values.append(kid(parted(x), parted(y), 12)["value"])
    assert abs(np.mean(values)) < 3 * np.std(values) / 60**0.5 and min(values) < 0


@pytest.mark.parametrize("size", [1, 31])
def test_subsets_must_fit(generator, size):
    x, y = made(40, 30, 2, generator)
    with pytest.raises(UsageError, match=f"^subsets of {size} images: expected 2 to 30, the images of the smaller set"):
        kid_subsets(x, y, size=size)
