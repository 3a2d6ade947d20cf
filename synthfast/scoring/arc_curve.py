"""The success curve of robust discriminators: monotone fit, floor, area, and intervals over the held-out images.

Outcomes are [radii, images], 1 where the discriminator of a radius is right on an image's whole ball, else 0. Success at a radius
is the mean of the share of real images and that of synthetic ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CHANCE = 0.5
_INTERVAL = (2.5, 97.5)
_STREAM = 3  # of the seed's host choices: 0 to 2 are the split's
_BLOCK = 64  # draws made at once


def isotonic(values: np.ndarray) -> np.ndarray:
    """The non-increasing sequence nearest to ``values`` [..., n] in least squares, all weights equal.

    What pooling adjacent violators finds (Barlow et al. 1972), by its closed form, for many sequences at once:
    g_i = min over s <= i of max over t >= i of mean(values_s .. values_t).
    """
    values = np.asarray(values, np.float64)
    n = values.shape[-1]
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), values.cumsum(-1)], -1)
    first, last = np.arange(n)[:, None], np.arange(n)[None, :]
    lengths = last - first + 1
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / np.maximum(lengths, 1)
    means = np.where(lengths > 0, means, -np.inf)
    highest = np.flip(np.maximum.accumulate(np.flip(means, -1), -1), -1)  # over t >= i, for each s
    highest = np.where(lengths > 0, highest, np.inf)
    return np.diagonal(np.minimum.accumulate(highest, -2), axis1=-2, axis2=-1)


def area(eps: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """The integral of max(a - 1/2, 0) by the trapezoid rule: [...] from radii [n] and non-increasing successes [..., n]."""
    above = np.maximum(accuracy - CHANCE, 0)
    return ((above[..., 1:] + above[..., :-1]) / 2 * np.diff(eps)).sum(-1)


def success(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Mean of the shares of both kinds: float64 [radii] from outcomes [radii, images of the kind]."""
    return (real.mean(-1) + synthetic.mean(-1)) / 2


@dataclass(frozen=True)
class Area:
    """ARC of a curve.

    value, ci: the area, and its 95% interval.
    accuracy: raw success at each radius, float64 [n]; accuracy_ci: its 95% intervals [n, 2].
    fitted: the non-increasing fit; floored: bool [n], where 1/2 stands in for it.
    """

    value: float
    ci: tuple[float, float]
    accuracy: np.ndarray
    accuracy_ci: np.ndarray
    fitted: np.ndarray
    floored: np.ndarray


def measure_area(eps: Sequence[float], real: np.ndarray, synthetic: np.ndarray, *, draws: int, seed: int) -> Area:
    """The area under a curve and its percentile bootstrap (Efron 1979) over the held-out images.

    A draw takes real and synthetic images apart, each with replacement, and all radii see the same ones, so that what
    discriminators have in common stays in common. Fit, floor and area follow for each draw. The discriminators stay as they are.

    Args:
        eps: ascending radii [n].
        real, synthetic: outcomes [n, images of the kind] in [0, 1]; a radius that needs no discriminator has 1/2 everywhere.
        draws: number of draws.
        seed: of the draws.
    """
    radii = np.asarray(eps, np.float64)
    accuracy = success(real, synthetic)
    drawn = np.concatenate(list(_drawn(real, synthetic, draws, seed)))
    fitted = isotonic(accuracy)
    low, high = np.percentile(area(radii, isotonic(drawn)), _INTERVAL)
    value = float(area(radii, fitted))
    return Area(
        value,
        (min(float(low), value), max(float(high), value)),
        accuracy,
        np.percentile(drawn, _INTERVAL, axis=0).T,
        fitted,
        fitted < CHANCE,
    )


def _drawn(real: np.ndarray, synthetic: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Successes [k, radii] of some draws at a time, ``draws`` in all."""
    generator = np.random.default_rng([seed % 2**64, _STREAM])
    kinds = [np.ascontiguousarray(kind.T, np.float64) for kind in (real, synthetic)]
    for first in range(0, draws, _BLOCK):
        count = min(_BLOCK, draws - first)
        shares = []
        for kind in kinds:
            images = len(kind)
            weights = generator.multinomial(images, np.full(images, 1 / images), size=count)
            shares.append(weights @ kind / images)
        yield (shares[0] + shares[1]) / 2
