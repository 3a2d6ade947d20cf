"""Is a synthetic image a copy of a training image? A test whose rate of false alarms is known.

An image is compared with its nearest training image in two ways: by their distance, and by the ratio of that distance to the
nearest training image's distance to its own k-th neighbour in the training set. The ratio asks whether the image is nearer than
other images of that region usually are, as in Carlini et al. (2023), "Extracting training data from diffusion models" (section
4.2): where images are simple and alike, such as ones among digits, small distances mean little.

How small is too small is learned from the training images: each is compared with all others in the same way, as if it were
new. If the training images are independent draws, a new real image is like one of them, so that the share of training images
that are at least as close, by the larger of the two ranks, is its conformal p-value (Vovk et al. 2005): of new real images a
share of at most about s has a p-value up to s. A generator that copies has more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from synthfast.errors import UsageError
from synthfast.scoring.neighbours import k_nearest, nearest

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Nearness:
    """Images beside their nearest training image.

    index: of the nearest training image, int64 [n].
    distance, ratio: float32 [n].
    p: conformal p-value, float32 [n] in (0, 1].
    """

    index: np.ndarray
    distance: np.ndarray
    ratio: np.ndarray
    p: np.ndarray


class Memorization:
    """The comparison with a training set.

    Args:
        train: features of the training images, float32 [n, d], on the device that compares; n of at least k + 2.
        k: the neighbour whose distance is the size of a region.
        name: what errors call the training set.
    """

    def __init__(self, train: Tensor, k: int, name: str) -> None:
        check_enough(name, len(train), k)
        self.train, self.count = train, len(train)
        distances, indices = k_nearest(train, None, k + 1)
        distances, neighbour = distances.cpu().numpy(), indices[:, 0].cpu().numpy()
        self.radii = distances[:, k - 1]
        nearest_distance = distances[:, 0]
        # Without image i, the k-th neighbour of its own neighbour is the next one if i was among the first k.
        own = nearest_distance <= self.radii[neighbour]
        radii = np.where(own, distances[neighbour, k], self.radii[neighbour])
        self.null_distance = nearest_distance
        self.null_ratio = _ratio(nearest_distance, radii)
        self._distances, self._ratios = np.sort(self.null_distance), np.sort(self.null_ratio)
        self._null = np.sort(np.maximum(*self._ranks(self.null_distance, self.null_ratio)))

    def __call__(self, images: Tensor) -> Nearness:
        """Compare images, given by their features, float32 [m, d]."""
        distance, index = (values.cpu().numpy() for values in nearest(images, self.train))
        ratio = _ratio(distance, self.radii[index])
        # An image's rank among the training images counts itself, as theirs does.
        rank = np.maximum(*self._ranks(distance, ratio)) + 1
        p = (1 + np.searchsorted(self._null, rank, side="right")) / (self.count + 1)
        return Nearness(index, distance, ratio, p.astype(np.float32))

    def _ranks(self, distance: np.ndarray, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many training images have at most this distance, and at most this ratio."""
        return (
            np.searchsorted(self._distances, distance, side="right"),
            np.searchsorted(self._ratios, ratio, side="right"),
        )

    def thresholds(self, share: float) -> dict[str, Any]:
        """What a p-value of at most ``share`` means: the nearest training image is closer than both of these.

        Returns {"distance", "ratio"}; both 0 where no image can be flagged, since too many training images have copies among
        themselves.
        """
        allowed = _allowed(share, self.count)
        limit = int(self._null[min(allowed, self.count - 1)]) - 1 if allowed < self.count else self.count
        if limit < 1:
            return {"distance": 0.0, "ratio": 0.0}
        return {"distance": float(self._distances[limit - 1]), "ratio": float(self._ratios[limit - 1])}


def _ratio(distance: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """distance / radius as float32; 0 for a distance of 0, and the largest number where the radius alone is 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(distance == 0, 0.0, distance.astype(np.float64) / radius)
    return np.minimum(ratio, _LARGEST).astype(np.float32)


def _allowed(share: float, count: int) -> int:
    """How many training images may be as close as an image with a p-value of ``share`` is."""
    return math.floor(share * (count + 1) * (1 + 1e-9)) - 1


def check_enough(name: str, images: int, k: int) -> None:
    """UsageError unless a training set of so many images has k neighbours to spare."""
    if images < k + 2:
        raise UsageError(f"-k {k}: {name} has {images} images, expected at least k + 2; lower it")


def check_null_share(share: float, count: int) -> None:
    """UsageError where so small a share cannot be told from none with ``count`` training images."""
    if _allowed(share, count) < 0:
        raise UsageError(
            f"--null-share {share:g}: {count} training images tell shares from {1 / (count + 1):.3g} on; raise it"
        )
