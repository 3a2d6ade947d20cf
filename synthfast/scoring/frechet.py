"""The Frechet distance between Gaussian fits of two sets of features (FID), its interval, and its limit for infinite sets.

    FID = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))        (Heusel et al. 2017, arXiv:1706.08500)

The mean m and the covariance S are estimated from n images, and FID from n images is larger than that from infinitely many by
about a / n. It is reported as everybody computes it; :func:`fid_scores` also gives the limit, as Chong and Forsyth (2020,
arXiv:1911.07023) extrapolate it.

Everything is made from the moments of twelve random parts of each set, so that no feature is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast.evaluation.interval import t_quantile
from synthfast.scoring.moments import PARTS, Moments, merge

_LEVELS = (1, 2, 3, 4)  # the sets are cut into so many subsets for the extrapolation; all of them divide PARTS
# Images a dimension that a subset must have: with fewer, FID is no line in 1 / n. Measured on Gaussians, see the tests.
_LEAST = 3.0
_NOISE = 1e-9  # of the sum of roots, which rounding may amount to
_EPS = torch.finfo(torch.float64).eps


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """FID from means [d] and covariances [d, d], float64; covariances may be of any rank. Not negative.

    The trace of (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of F1^T S2 F1, S1 = F1 F1^T by Cholesky, or from
    eigenvectors where S1 has not full rank. Rounding spoils small eigenvalues more than their roots can bear; where that would
    show (1e-9 of the sum), it is the sum of the singular values of F2^T F1 instead.
    """
    trace = _trace_of_root(covariance1, covariance2)
    value = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * trace
    return max(float(value), 0.0)


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    factor = _cholesky(a)
    if factor is None:
        a, b = b, a
        factor = _cholesky(a)
    if factor is None:
        factor = _factor(a)
    values = torch.linalg.eigvalsh(factor.T @ b @ factor).clamp(min=0)
    roots = values.sqrt()
    if not len(roots):  # one of the two has no spread at all
        return roots.sum()
    noise = _EPS * values.amax()  # of an eigenvalue; of its root as far as that is smaller
    if (noise / torch.maximum(roots, noise.sqrt())).nan_to_num().sum() <= _NOISE * roots.sum():
        return roots.sum()
    other = _cholesky(b)
    return torch.linalg.svdvals((_factor(b) if other is None else other).T @ factor).sum()


def _cholesky(matrix: Tensor) -> Tensor | None:
    """L of a matrix that is safely positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    diagonal = lower.diagonal().square()
    return lower if diagonal.min() > 64 * len(matrix) * _EPS * diagonal.max() else None


def _factor(matrix: Tensor) -> Tensor:
    """F [d, rank] with F F^T = matrix, positive semidefinite; directions of rounding alone are left out."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > len(matrix) * _EPS * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def fid(real: Moments, synthetic: Moments) -> float:
    """FID from moments; needs two images of each."""
    return frechet_distance(real.mean, real.covariance, synthetic.mean, synthetic.covariance)


def fid_scores(real: Moments | Sequence[Moments], synthetic: Sequence[Moments]) -> dict[str, dict[str, Any]]:
    """``fid`` and ``fid_infinity`` as values of the result format, from the moments of twelve random parts of each set.

    ``fid_infinity`` is the intercept of the line through the mean FID of disjoint subsets (the whole, halves, thirds and
    quarters of both sets) against the number of subsets, which is proportional to 1 / n. With fewer than three images a dimension
    in a third, there is no line: the value is None.

    The intervals (95%) are delete-one-part jackknives: the parts are left out one after the other, which moves a smooth function
    of moments as the sampling of images does (Efron and Stein 1981); Student's t with 11 degrees of freedom. A bootstrap would
    not do: it repeats images, which makes FID larger. The interval of ``fid`` holds the mean of FID over sets of this size, that
    of ``fid_infinity`` the distance of the distributions.

    Args:
        real: as ``synthetic``; or the moments of the whole, such as published ones, which are then taken as exact.
        synthetic: twelve parts, together with at least twice as many images; none of them empty.
    """
    fixed = real if isinstance(real, Moments) else None
    pairs = [(None if fixed is not None else one, two) for one, two in zip_parts(real, synthetic)]
    dim = len(synthetic[0].mean)
    smallest = min(sum(p.count for p in side) for side in ([*synthetic], [] if fixed is not None else [*real]) if side)
    levels = [level for level in _LEVELS if level == 1 or smallest >= _LEAST * dim * level]

    def distance(chosen: Sequence[int]) -> float:
        two = merge([pairs[k][1] for k in chosen])
        one = fixed if fixed is not None else merge([pairs[k][0] for k in chosen])  # type: ignore[misc]
        return fid(one, two)

    subsets = {level: np.array_split(np.arange(PARTS), level) for level in levels}
    whole = {level: [distance(subset) for subset in subsets[level]] for level in levels}
    without: dict[int, list[list[float]]] = {level: [] for level in levels}
    for part in range(PARTS):
        for level in levels:
            values = list(whole[level])
            place = next(k for k, subset in enumerate(subsets[level]) if part in subset)
            values[place] = distance([k for k in subsets[level][place] if k != part])
            without[level].append(values)
    count = sum(part.count for part in synthetic)
    found = {"fid": _entry(whole[1][0], [values[0] for values in without[1]], count)}
    if len(levels) < 3:
        return {**found, "fid_infinity": {"value": None, "ci": None, "count": count}}
    weights = _intercept_weights(levels)
    limit = sum(weights[level] * float(np.mean(whole[level])) for level in levels)
    replicates = [
        sum(weights[level] * float(np.mean(without[level][part])) for level in levels) for part in range(PARTS)
    ]
    return {**found, "fid_infinity": _entry(limit, replicates, count)}


def zip_parts(real: Moments | Sequence[Moments], synthetic: Sequence[Moments]) -> list[tuple[Moments | None, Moments]]:
    """Part k of the one with part k of the other."""
    if isinstance(real, Moments):
        return [(None, part) for part in synthetic]
    return list(zip(real, synthetic, strict=True))


def _intercept_weights(levels: Sequence[int]) -> dict[int, float]:
    """Weights of the least-squares intercept at 0 of values at ``levels``."""
    design = np.stack([np.ones(len(levels)), np.array(levels, float)], 1)
    return dict(zip(levels, np.linalg.pinv(design)[0].tolist(), strict=True))


def _entry(value: float, replicates: Sequence[float], count: int) -> dict[str, Any]:
    return {"value": value, "ci": jackknife_interval(value, replicates), "count": count}


def jackknife_interval(value: float, replicates: Sequence[float]) -> list[float]:
    """The 95% interval around ``value`` from its values with each of g parts of equal size left out (Student's t, g - 1)."""
    parts = len(replicates)
    spread = np.asarray(replicates) - np.mean(replicates)
    half = t_quantile(parts - 1) * math.sqrt((parts - 1) / parts * float((spread * spread).sum()))
    return [value - half, value + half]
