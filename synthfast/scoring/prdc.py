"""Precision, recall, density and coverage: do the synthetic images look real, and do they show all that real ones do?

Around each image of a set lies a ball that reaches to its k-th nearest neighbour within the set; the balls together stand for
where the images of that kind lie.

- precision: share of synthetic images inside a real ball; recall: share of real images inside a synthetic one (Kynkaanniemi et
  al. 2019, arXiv:1904.06991).
- density: mean number of real balls that hold a synthetic image, divided by k, which an outlier among the real images with its
  large ball moves less; coverage: share of real balls that hold a synthetic image (Naeem et al. 2020, arXiv:2002.09797).

Counts are those of the ``prdc`` package on the same features, in a small part of its time and memory: the distances within the
real images give the real radii, those within the synthetic ones theirs, and those between both all four counts at once. Only
where an image has so many doubles that its radius is 0, or near it, is the answer of ``prdc`` a matter of its rounding; here 0
is 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synthfast.errors import UsageError
from synthfast.evaluation.interval import share
from synthfast.scoring.neighbours import balls, kth_distances

_DRAWS = 2000


@dataclass(frozen=True)
class Manifolds:
    """What the balls of two sets hold.

    Attributes:
        k: which neighbour the balls reach to.
        real_radii: float32 [n]; synthetic_radii: float32 [m].
        hits: int64 [m], the number of real balls that hold each synthetic image.
        covered: bool [n], real balls that hold a synthetic image.
        recalled: bool [n], real images that a synthetic ball holds.
    """

    k: int
    real_radii: np.ndarray
    synthetic_radii: np.ndarray
    hits: np.ndarray
    covered: np.ndarray
    recalled: np.ndarray

    @property
    def precision(self) -> float:
        return float((self.hits > 0).mean())

    @property
    def recall(self) -> float:
        return float(self.recalled.mean())

    @property
    def density(self) -> float:
        return float(self.hits.mean() / self.k)

    @property
    def coverage(self) -> float:
        return float(self.covered.mean())

    def entries(self, seed: int = 0) -> dict[str, dict[str, Any]]:
        """The four as values of the result format, with 95% intervals: Wilson's for the shares, of density by a bootstrap over
        the synthetic images. They hold for the balls as they are; the choice of the images around which they lie is not in them.
        """
        return {
            "precision": share(self.hits > 0),
            "recall": share(self.recalled),
            "density": {
                "value": self.density,
                "ci": _mean_interval(self.hits, self.k, seed),
                "count": len(self.hits),
            },
            "coverage": share(self.covered),
        }


def prdc(real: Tensor, synthetic: Tensor, k: int = 5) -> Manifolds:
    """Compare two sets of features, float32 [n, d] and [m, d] on one device, both with more than ``k`` images.

    Time: n^2 / 2 + m^2 / 2 + n m products of d numbers in float32. Memory: a float32 copy of both sets and a few small blocks.
    """
    if len(real) <= k or len(synthetic) <= k:
        raise UsageError(
            f"--k {k}: expected more than {k} images in each set, found {len(real):,} real and {len(synthetic):,} synthetic "
            "ones; lower it or take more images"
        )
    real_radii, synthetic_radii = kth_distances(real, k), kth_distances(synthetic, k)
    hits = torch.zeros(len(synthetic), dtype=torch.int64, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    for found in balls(real, synthetic, real_radii, synthetic_radii):
        held = found.in_row_ball
        hits += torch.bincount(found.columns[held], minlength=len(synthetic))
        covered[found.rows[held]] = True
        recalled[found.rows[found.in_column_ball]] = True
    arrays = (value.cpu().numpy() for value in (real_radii, synthetic_radii, hits, covered, recalled))
    return Manifolds(k, *arrays)


def _mean_interval(hits: np.ndarray, k: int, seed: int) -> list[float]:
    """The middle 95% of the mean of ``hits`` / k over bootstrap draws of the images; a draw is how often each value comes."""
    values, counts = np.unique(hits, return_counts=True)
    random = np.random.default_rng([seed % 2**64, len(hits)])
    draws = random.multinomial(len(hits), counts / len(hits), _DRAWS) @ values / (len(hits) * k)
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]
