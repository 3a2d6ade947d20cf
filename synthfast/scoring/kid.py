"""The kernel distance of two sets of features (KID, Binkowski et al. 2018, arXiv:1801.01401).

KID is the squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, by its unbiased estimator: 0 on average for equal
distributions, whatever the number of images, and so sometimes negative. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast.errors import UsageError
from synthfast.scoring.frechet import jackknife_interval

_BLOCK = 2048  # rows and columns of a block of kernel values


@dataclass(frozen=True)
class Parted:
    """Features float32 [n, d] and the random part, int64 [n] in [0, parts), that each belongs to."""

    features: Tensor
    part: np.ndarray

    def split(self, parts: int) -> list[Tensor]:
        """The features of each part, in float64."""
        where = torch.from_numpy(self.part).to(self.features.device)
        return [self.features[where == part].double() for part in range(parts)]


def kid(real: Parted, synthetic: Parted, parts: int) -> dict[str, Any]:
    """KID of all images by the unbiased estimator, as a value of the result format; every pair of images counts once.

    The interval (95%) is a delete-one-part jackknife, as in :func:`synthfast.scoring.frechet.fid_scores`: the kernel is summed by
    pairs of parts, from which every replicate follows. Each part must have an image of each set, and each set two parts.
    """
    sums = _Sums(real.split(parts), synthetic.split(parts))
    everything = range(parts)
    replicates = [sums.mmd([part for part in everything if part != left]) for left in everything]
    value = sums.mmd(list(everything))
    return {"value": value, "ci": jackknife_interval(value, replicates), "count": len(synthetic.features)}


class _Sums:
    """Sums of the kernel over pairs of parts of two sets, and the numbers of images."""

    def __init__(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
        self.n, self.m = (np.array([len(part) for part in side]) for side in (x, y))
        self.xx, self.yy = _within(x), _within(y)
        self.xy = np.array([[_kernel_sum(a, b) for b in y] for a in x])

    def mmd(self, chosen: Sequence[int]) -> float:
        """The unbiased estimate from some of the parts."""
        n, m = int(self.n[chosen].sum()), int(self.m[chosen].sum())
        grid = np.ix_(chosen, chosen)
        same = self.xx[grid].sum() / (n * (n - 1)) + self.yy[grid].sum() / (m * (m - 1))
        return float(same - 2 * self.xy[grid].sum() / (n * m))


def _within(parts: Sequence[Tensor]) -> np.ndarray:
    """Sums over pairs of different images of one set, by their parts."""
    sums = np.zeros((len(parts), len(parts)))
    for a, one in enumerate(parts):
        for b, other in enumerate(parts[: a + 1]):
            sums[a, b] = sums[b, a] = _kernel_sum(one, other)
        sums[a, a] -= float(_kernel(one.square().sum(1), one.shape[1]).sum())
    return sums


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in a.split(_BLOCK):
        for columns in b.split(_BLOCK):
            total += _kernel(rows @ columns.T, a.shape[1]).sum()
    return float(total)


def _kernel(products: Tensor, dim: int) -> Tensor:
    """(x.y / d + 1)^3 from x.y, in place."""
    base = products.div_(dim).add_(1)
    return base.square().mul_(base)


def kid_subsets(real: Tensor, synthetic: Tensor, *, size: int = 1000, count: int = 100, seed: int = 2020) -> np.ndarray:
    """KID of ``count`` pairs of random subsets of ``size`` images, float64 [count], as torch-fidelity draws them from ``seed``.

    Their mean is the KID that torch-fidelity reports; the subsets overlap, so their spread is no error of it.

    Args:
        real, synthetic: features float32 [n, d] and [m, d].
    """
    least = min(len(real), len(synthetic))
    if not 2 <= size <= least:
        raise UsageError(
            f"subsets of {size:,} images: expected 2 to {least:,}, the images of the smaller set; lower it"
        )
    random = np.random.RandomState(seed % 2**32)
    values = []
    for _ in range(count):
        one, two = (
            side[torch.from_numpy(random.choice(len(side), size, replace=False)).to(side.device)].double()
            for side in (real, synthetic)
        )
        values.append(_Sums([one], [two]).mmd([0]))
    return np.array(values)
