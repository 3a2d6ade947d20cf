"""``synthfast select``: from the scores of images to a selection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from synthfast.artifacts import Lock
from synthfast.config import SelectConfig
from synthfast.data import ShardSet
from synthfast.data.selection import check_may_write, write_selection
from synthfast.errors import UsageError
from synthfast.selection.score_files import ScoreFolder

DEFAULT_KEEP = 0.2
WEIGHT_LIMIT = 10.0  # weights are at most so many times, and at least one so-manieth, of the median's
FILTER = "not-memorized"
_RANDOM_STREAM = 21


def select(config: SelectConfig) -> dict[str, Any]:
    """Choose images, write the selection ``config.out`` and return its manifest.

    The images that ``not-memorized`` leaves (all without it) are ranked by every other criterion, within their class where the
    selection is balanced, and those with the best mean ranks are kept; of equals the one that comes first. Without another
    criterion the order is random. Balanced, each class that occurs keeps the same number: its part of ``keep`` times all
    images, or where a class has fewer left, as many as that class has. See :func:`low_density_weights` for the weights.

    Raises:
        UsageError: nothing would be kept, or labels are missing for a balanced selection.
        SynthfastError: scores that are missing, stale or damaged.
    """
    images = ShardSet(config.folder[0])
    scores = ScoreFolder(images, config.scores_folder)
    check_may_write(config.out)  # before the work
    with Lock(config.out):
        return _select(config, images, scores)


def _select(config: SelectConfig, images: ShardSet, scores: ScoreFolder) -> dict[str, Any]:
    # What is only filtered keeps all that is left.
    ranked = any(name != FILTER for name in config.criteria)
    balanced = config.balanced if config.balanced is not None else images.labels is not None and ranked
    if balanced and images.labels is None:
        raise UsageError(f"--balanced: {images.name} has no labels to balance; give --no-balanced")
    read = _Read(scores, images.labels is not None)
    left = np.arange(len(images))
    if FILTER in config.criteria:
        left = np.flatnonzero(read("memorization", "memorization_p") > np.float32(scores.null_share()))
        if len(left) == 0:
            raise UsageError(f"--by {FILTER}: all {len(images):,} images of {images.name} are flagged; nothing to keep")
    rankings = [name for name in config.criteria if name != FILTER]
    keep = config.keep if config.keep is not None else (DEFAULT_KEEP if rankings else 1.0)
    # Higher is better in all of them.
    values = [_values(name, read, config.seed, len(images))[left] for name in rankings or ["random"]]
    groups = _groups(images.labels, left) if balanced else [np.arange(len(left))]
    wanted = _wanted(keep, len(images), images.labels if balanced else None, images.name)
    count = min(wanted, *(len(group) for group in groups))
    if count == 0:
        raise UsageError(
            f"--by {FILTER}: leaves no image of some class of {images.name}, so that a balanced selection is empty; give "
            "--no-balanced"
        )
    indices = np.sort(np.concatenate([left[group[best(values, group, count)]] for group in groups]))
    weights = None
    if config.low_density is not None:
        weights = low_density_weights(read("density", "density_distance")[indices], config.low_density)
    criteria = {
        "by": list(config.criteria),
        "keep": keep,
        "balanced": balanced,
        "low_density": config.low_density,
        "seed": config.seed,
        "left": len(left),
        "wanted": wanted * len(groups),
        "scores": read.digests,
    }
    return write_selection(config.out, images, indices, weights, criteria)


class _Read:
    """Reads columns and notes their SHA-256."""

    def __init__(self, scores: ScoreFolder, labelled: bool) -> None:
        self._scores, self.labelled = scores, labelled
        self.digests: dict[str, str] = {}

    def __call__(self, score: str, column: str) -> np.ndarray:
        values = self._scores.read(score, column)
        self.digests[column] = self._scores.sha256(score)[column]
        return values


def _values(name: str, read: _Read, seed: int, count: int) -> np.ndarray:
    """A number for each image, higher for those to keep."""
    if name == "discriminator":
        return read("discriminator", "discriminator")
    if name == "density":
        return -read("density", "density_distance")
    if name == "confidence":
        return read("confidence", "confidence" if read.labelled else "confidence_max")
    return np.random.default_rng([seed % 2**64, _RANDOM_STREAM]).random(count)


def _wanted(keep: float, count: int, labels: np.ndarray | None, name: str) -> int:
    """How many images to keep, of each class that occurs where there are ``labels``."""
    classes = 1 if labels is None else int((np.bincount(labels) > 0).sum())
    wanted = round(keep * count) // classes
    if wanted == 0:
        of_each = "" if labels is None else f" of each of its {classes} classes"
        raise UsageError(f"--keep {keep:g}: would keep none of the {count:,} images of {name}{of_each}; raise it")
    return wanted


def _groups(labels: np.ndarray | None, left: np.ndarray) -> list[np.ndarray]:
    """For each class that occurs in the whole set, where its images are among ``left``: ascending int64."""
    assert labels is not None
    occur = np.bincount(labels) > 0
    order = np.argsort(labels[left], kind="stable")
    ends = np.cumsum(np.bincount(labels[left], minlength=len(occur)))
    return [part for part, occurs in zip(np.split(order, ends[:-1]), occur, strict=True) if occurs]


def best(values: Sequence[np.ndarray], group: np.ndarray, count: int) -> np.ndarray:
    """Which ``count`` of the entries ``group`` (ascending int64 [m]) of ``values`` have the best mean ranks: int64 [count].

    Each of ``values`` is [n], higher being better; equal values share the mean of their ranks, and of equal mean ranks those that
    come first are taken. The answer indexes ``group``.
    """
    total = sum(ranks(each[group]) for each in values)
    return np.argsort(-total, kind="stable")[:count]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 (lowest) to n, equal values sharing the mean of theirs: float64 [n]."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def low_density_weights(distance: np.ndarray, power: float) -> np.ndarray:
    """Sampling weights that favour regions which the real data cover poorly: float32 [n], mean 1.

    The density of real images around an image is about k / (n V d^D), where d is the distance to the k-th real neighbour and D
    the dimension of their manifold (Loftsgaarden and Quesenberry 1965). The weight (d / median d)^power is therefore the
    density to the power -power / D; it is cut to [1/10, 10], so that no image dominates, and divided by its mean.

    Args:
        distance: of the selected images to their k-th real neighbour, float [n], not negative.
        power: above 0; larger ones lean further toward sparse regions.
    """
    distance = distance.astype(np.float64)
    middle = np.median(distance)
    if middle == 0:  # most are copies of real images, which have no density to tell apart
        middle = distance[distance > 0].min() if (distance > 0).any() else 1.0
    with np.errstate(over="ignore"):
        weights = np.clip((distance / middle) ** power, 1 / WEIGHT_LIMIT, WEIGHT_LIMIT)
    return (weights / weights.mean()).astype(np.float32)
