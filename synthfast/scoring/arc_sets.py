"""The images of an ARC: as many real as synthetic ones, split into a part to train with, one to validate and one held out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synthfast.data import Chosen, ImageSet
from synthfast.errors import UsageError
from synthfast.scoring.discriminator import TrainingSets

VALIDATION = 0.15  # the share of the images by which states are chosen
# Images of a kind that are validated with and held out at most: more would cost more than training, and tell little more.
MOST_VALIDATION, MOST_HELD_OUT = 500, 5000
LEAST = 20  # images of a kind; nothing can be learned from fewer
_LEAST_STRATIFIED = 0.5  # classes are balanced if that leaves so much of the smaller set


@dataclass(frozen=True)
class ArcSets:
    """The images that an ARC is made of, on the device.

    training: to train with and to validate.
    real, synthetic: held out, uint8 [n, H, W, C].
    classes: of the held-out images, int64 [n], the same for both kinds; None where classes were not balanced.
    warning: why they were not, though there are labels.
    """

    training: TrainingSets
    real: Tensor
    synthetic: Tensor
    classes: np.ndarray | None
    warning: str | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Images of each kind in each part."""
        parts = {
            "training": self.training.real,
            "validation": self.training.real_validation,
            "held_out": self.real,
        }
        return {name: len(images) for name, images in parts.items()}


def split_sets(
    real: ImageSet, synthetic: ImageSet, *, n: int | None, held_out: float, seed: int, device: torch.device
) -> ArcSets:
    """Choose and split the images.

    Both kinds are drawn at random, n of each (by default as many as the smaller set has). Where both have labels of the same
    classes, all parts hold the classes in the proportions of the real set, so that a class has as many images of one kind as of
    the other: results by class are balanced, and a discriminator cannot tell the kinds by how frequent their classes are.

    Args:
        held_out: share of the images to measure on, up to 5,000 of a kind; 0.15 validate, up to 500; the rest trains.
        seed: of the draw.

    Raises:
        UsageError: images of different shapes, the same set twice, too few images.
    """
    _check(real, synthetic, n)
    counts, warning = _class_counts(real, synthetic, n)
    total = int(counts.sum())
    shares = np.minimum([VALIDATION, held_out], np.array([MOST_VALIDATION, MOST_HELD_OUT]) / total)
    if min(np.rint(shares * total)) < 1:
        raise UsageError(f"--held-out {held_out:g}: none of {total} images of a kind would be held out; raise it")
    parts: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for stream, (kind, images) in enumerate((("real", real), ("synthetic", synthetic))):
        generator = np.random.default_rng([seed % 2**64, stream])
        parts[kind] = _parts(_drawn(images, counts, generator), shares)
    read = {
        kind: [Chosen(images, items) for items in parts[kind]]
        for kind, images in (("real", real), ("synthetic", synthetic))
    }
    training = TrainingSets.read(read["real"][0], read["synthetic"][0], read["real"][1], read["synthetic"][1], device)
    held = [torch.from_numpy(read[kind][2].read(np.arange(len(read[kind][2])))).to(device) for kind in read]
    classes = read["real"][2].labels if counts is not None and len(counts) > 1 else None
    return ArcSets(training, held[0], held[1], classes, warning)


def _check(real: ImageSet, synthetic: ImageSet, n: int | None) -> None:
    if real.shape != synthetic.shape:
        raise UsageError(
            f"{synthetic.name}: expected images {list(real.shape)} as {real.name} has, found {list(synthetic.shape)}; "
            "choose sets of one size, or give --image-size where a set can be resized"
        )
    if real.fingerprint() == synthetic.fingerprint():
        raise UsageError(
            f"{synthetic.name}: holds the same images as {real.name}, so nothing could tell them apart; compare different "
            "sets (two halves of one, as npz files, must give 0)"
        )
    most = min(len(real), len(synthetic))
    if n is not None and n > most:
        smaller = real if len(real) == most else synthetic
        raise UsageError(f"--n {n}: {smaller.name} holds {most} images; lower it or take a larger set")
    if most < LEAST:
        raise UsageError(f"{real.name} and {synthetic.name}: expected at least {LEAST} images of each, found {most}")


def _class_counts(real: ImageSet, synthetic: ImageSet, n: int | None) -> tuple[np.ndarray, str | None]:
    """Images of each class to draw from either set, int64 [classes]; one number where classes do not count."""
    most = min(len(real), len(synthetic)) if n is None else n
    whole = np.array([most])
    if real.labels is None or synthetic.labels is None or real.classes != synthetic.classes:
        return whole, None
    have, offered = (np.bincount(images.labels, minlength=real.classes or 0) for images in (real, synthetic))
    shares = have / have.sum()
    present = shares > 0
    fitting = int(min(most, (offered[present] * have.sum() // have[present]).min()))
    if fitting < _LEAST_STRATIFIED * most or fitting < LEAST or (offered[~present] > 0).any():
        return whole, "the classes of the two sets are in different proportions; images were drawn regardless of class"
    return _shared_out(fitting, shares, np.minimum(have, offered)), None


def _shared_out(total: int, shares: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whole numbers that add up to ``total``, in proportion to ``shares`` and at most ``most``: by largest remainder."""
    exact = total * shares
    counts = np.minimum(np.floor(exact).astype(np.int64), most)
    for label in np.argsort(-(exact - counts), kind="stable"):
        if counts.sum() < total and counts[label] < most[label]:
            counts[label] += 1
    return counts


def _drawn(images: ImageSet, counts: np.ndarray, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Items of each class in random order, int64 [count]."""
    for label, count in enumerate(counts):
        items = np.arange(len(images))
        if len(counts) > 1:
            assert images.labels is not None
            items = np.flatnonzero(images.labels == label)
        yield generator.permutation(items)[:count]


def _parts(by_class: Iterator[np.ndarray], shares: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items to train with, to validate and held out. Classes are cut so that the parts keep their shares over all classes too."""
    parts: tuple[list[np.ndarray], ...] = ([], [], [])
    done = 0
    ends = np.zeros(2, np.int64)  # validation and held-out images so far
    for items in by_class:
        done += len(items)
        wanted = np.rint(shares * done).astype(np.int64)
        validation, held = np.clip(wanted - ends, 0, None)
        held = min(held, len(items) - validation)
        ends += (validation, held)
        cuts = np.split(items, [len(items) - validation - held, len(items) - held])
        for part, cut in zip(parts, cuts, strict=True):
            part.append(cut)
    train, validate, measure = (np.concatenate(part) for part in parts)
    return train, validate, measure
