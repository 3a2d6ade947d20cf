"""FID against scipy, torch-fidelity and closed forms; intervals and the limit on Gaussians whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from synthfast.scoring.frechet import fid, fid_scores, frechet_distance, jackknife_interval
from synthfast.scoring.moments import PARTS, Moments, merge


def covariance(dim: int, generator: torch.Generator, decay: float = 2.0, rank: int | None = None) -> torch.Tensor:
    """Random, with eigenvalues from 1 down to 10^-decay, or of lower rank."""
    count = dim if rank is None else rank
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q[:, :count]
    return rotation * torch.logspace(0, -decay, count, dtype=torch.float64) @ rotation.T


def by_scipy(m1: torch.Tensor, s1: torch.Tensor, m2: torch.Tensor, s2: torch.Tensor) -> float:
    root = scipy.linalg.sqrtm((s1 @ s2).numpy())
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root).real)


def parts(features: np.ndarray) -> list[Moments]:
    return [Moments.of(torch.from_numpy(part)) for part in np.array_split(features, PARTS)]


@pytest.mark.parametrize(("dim", "decay"), [(1, 1), (2, 0), (33, 2), (256, 3), (64, 8)])
def test_full_rank_is_scipys(generator, dim, decay):
    means = torch.randn(2, dim, dtype=torch.float64, generator=generator)
    one, two = (covariance(dim, generator, decay) for _ in range(2))
    found = frechet_distance(means[0], one, means[1], two)
    assert found == pytest.approx(by_scipy(means[0], one, means[1], two), rel=1e-9)
    assert found == pytest.approx(frechet_distance(means[1], two, means[0], one), rel=1e-12)


def test_commuting_covariances_have_a_closed_form(generator):
    rotation = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64, generator=generator)).Q
    a, b = torch.rand(2, 50, dtype=torch.float64, generator=generator)
    a[:20], b[10:30] = 0, 0  # ranks 30 and 30, of which 20 are shared
    one, two = (rotation * values @ rotation.T for values in (a, b))
    mean = torch.zeros(50, dtype=torch.float64)
    expected = float((a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(mean, one, mean, two) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mean, one, mean + 0.5, two) == pytest.approx(expected + 12.5, rel=1e-10)


@pytest.mark.parametrize("ranks", [(10, None), (None, 10), (10, 7), (39, 39), (1, 1)])
def test_any_rank(generator, ranks):
    """Against the singular values of a product of factors: of data matrices, which have them at once."""
    factors = [
        torch.randn(40, 40 if rank is None else rank, dtype=torch.float64, generator=generator) for rank in ranks
    ]
    one, two = (factor @ factor.T for factor in factors)
    mean = torch.zeros(40, dtype=torch.float64)
    shared = torch.linalg.svdvals(factors[0].T @ factors[1]).sum()
    expected = float(one.trace() + two.trace() - 2 * shared)
    assert frechet_distance(mean, one, mean, two) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("rank", [None, 5])
def test_equal_distributions_are_at_zero(generator, rank):
    one = covariance(30, generator, 6, rank)
    mean = torch.randn(30, dtype=torch.float64, generator=generator)
    assert 0 <= frechet_distance(mean, one, mean, one.clone()) < 1e-12
    zero = torch.zeros(3, 3, dtype=torch.float64)
    assert frechet_distance(mean[:3], zero, mean[:3] + 1, zero) == pytest.approx(3)


@pytest.mark.parametrize(("n", "m", "dim"), [(200, 300, 20), (30, 300, 50), (20, 25, 64)])
def test_features_give_what_torch_fidelity_gives(generator, n, m, dim):
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    one = torch.randn(n, dim, generator=generator).relu()
    two = (torch.randn(m, dim, generator=generator) * 1.1 + 0.1).relu()
    statistics = [fidelity.fid_features_to_statistics(x.double()) for x in (one, two)]
    expected = fidelity.fid_statistics_to_metric(*statistics, False)[fidelity.KEY_METRIC_FID]
    assert fid(Moments.of(one), Moments.of(two)) == pytest.approx(expected, rel=1e-6)


def worlds(count: int, n: int, m: int, dim: int, shift: float, scale: float, seed: int) -> list[tuple]:
    """(fid, fid_infinity) of real N(0, I) and synthetic N(shift, scale^2 I) images, sampled anew each time."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        real, synthetic = random.standard_normal((n, dim)), random.standard_normal((m, dim)) * scale + shift
        scores = fid_scores(parts(real), parts(synthetic))
        found.append((scores["fid"], scores["fid_infinity"]))
    return found


@pytest.mark.parametrize(("n", "m", "dim", "shift", "scale"), [(300, 600, 16, 0.2, 1.1), (500, 1000, 4, 0.5, 1.3)])
def test_intervals_hold_the_truth(n, m, dim, shift, scale):
    """95% intervals in 60 worlds: that of the limit holds the distance of the distributions, that of FID its own mean."""
    true = dim * shift**2 + dim * (1 - scale) ** 2
    found = worlds(60, n, m, dim, shift, scale, seed=1)
    values, limits = (np.array([pair[k]["value"] for pair in found]) for k in (0, 1))
    for k, target in ((0, values.mean()), (1, true)):
        held = sum(pair[k]["ci"][0] <= target <= pair[k]["ci"][1] for pair in found)
        assert held >= 53
        width = np.mean([pair[k]["ci"][1] - pair[k]["ci"][0] for pair in found])
        spread = (values if k == 0 else limits).std()
        assert 2 * 1.9 * spread < width < 2 * 3.5 * spread  # and no wider than it must be
    # FID of so few images is too large by its bias, which shows in many dimensions; the limit is not.
    error = limits.std() / 60**0.5
    assert abs(limits.mean() - true) < 4 * error
    assert dim < 16 or values.mean() - true > 4 * error


def test_the_limit_of_equal_distributions_is_zero():
    pairs = worlds(12, 1500, 1500, 24, 0, 1, seed=2)
    assert min(pair[0]["value"] for pair in pairs) > 0.15
    assert abs(np.mean([pair[1]["value"] for pair in pairs])) < 0.02
    assert all(pair[1]["ci"][0] < 0 < pair[1]["ci"][1] for pair in pairs)


def test_statistics_of_the_real_images_are_taken_as_exact():
    """The known truth on one side: only the synthetic images are extrapolated."""
    dim, random = 12, np.random.default_rng(3)
    true = Moments(10**9, torch.zeros(dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64) * (10**9 - 1))
    held = []
    for _ in range(30):
        scores = fid_scores(true, parts(random.standard_normal((400, dim)) * 1.2))
        assert scores["fid"]["count"] == 400
        held.append(scores["fid_infinity"]["ci"][0] <= dim * 0.04 <= scores["fid_infinity"]["ci"][1])
    assert sum(held) >= 26


def test_too_few_images_have_no_limit():
    random = np.random.default_rng(4)
    for n, m, has in ((9 * 8, 200, True), (9 * 8 - 1, 200, False), (200, 9 * 8 - 1, False)):
        scores = fid_scores(parts(random.standard_normal((n, 8))), parts(random.standard_normal((m, 8))))
        assert (scores["fid_infinity"]["value"] is not None) == has == (scores["fid_infinity"]["ci"] is not None)
        assert scores["fid"]["ci"] is not None


def test_the_whole_is_what_its_parts_give(generator):
    x, y = torch.randn(2, 100, 6, generator=generator, dtype=torch.float64).numpy()
    whole = fid(Moments.of(torch.from_numpy(x)), Moments.of(torch.from_numpy(y)))
    assert fid_scores(parts(x), parts(y))["fid"]["value"] == pytest.approx(whole, rel=1e-12)
    assert fid(merge(parts(x)), merge(parts(y))) == pytest.approx(whole, rel=1e-12)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(5).standard_normal(12)
    replicates = [(values.sum() - value) / 11 for value in values]
    low, high = jackknife_interval(values.mean(), replicates)
    half = scipy.stats.t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)
    assert (high + low) / 2 == pytest.approx(values.mean())
