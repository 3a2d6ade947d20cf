"""Moments of features, gathered in one pass over the images: of random parts, over batches, ranks and classes; and in files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from synthfast.artifacts import atomic_write_bytes
from synthfast.data import ImageSet
from synthfast.data.formats.npy import read_npz
from synthfast.distributed import Ranks
from synthfast.errors import SynthfastError, UsageError
from synthfast.scoring.features import Features, split

PARTS = 12
_STREAM = 7  # of the host's random numbers


@dataclass(frozen=True)
class Moments:
    """Number, mean and scatter of features, in float64.

    Attributes:
        count: n.
        mean: [d].
        scatter: [d, d], the sum of (x - mean)(x - mean)^T; the covariance is scatter / (n - 1).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def none(cls, dim: int, device: torch.device | None = None) -> Moments:
        zeros = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        return cls(0, torch.zeros(dim, dtype=torch.float64, device=device), zeros)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [n, d]."""
        x = features.double()
        mean = x.mean(0) if len(x) else x.sum(0)
        x = x - mean
        return cls(len(x), mean, x.T @ x)

    def merged(self, other: Moments) -> Moments:
        """Of both sets of images together (Chan et al. 1979)."""
        count = self.count + other.count
        if not self.count or not other.count:
            return other if not self.count else self
        step = other.mean - self.mean
        scatter = (self.scatter + other.scatter).addr_(step, step, alpha=self.count * other.count / count)
        return Moments(count, self.mean + step * (other.count / count), scatter)

    @property
    def covariance(self) -> Tensor:
        """[d, d], unbiased as numpy.cov has it; needs two images."""
        return self.scatter / (self.count - 1)


def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of several sets together."""
    return reduce(Moments.merged, parts)


@dataclass(frozen=True)
class Draw:
    """What is drawn for the images of a set.

    Attributes:
        part: int64 [n] in [0, PARTS), the random part of each image.
        place: int64 [n], its place in a random order of all.
    """

    part: np.ndarray
    place: np.ndarray


def draw(count: int, labels: np.ndarray | None, seed: int) -> Draw:
    """Parts of equal size up to one image; with ``labels`` (int64 [n]) each with its share of every class.

    So what parts differ by is what images of a class differ by. Sets of images have given numbers of every class; parts that
    differed in these as well would make intervals several times too wide.
    """
    random_order = np.random.default_rng([seed % 2**64, _STREAM]).permutation(count)
    place = np.empty(count, np.int64)
    place[random_order] = np.arange(count)
    dealt = random_order if labels is None else random_order[np.argsort(labels[random_order], kind="stable")]
    part = np.empty(count, np.int64)
    part[dealt] = np.arange(count) % PARTS
    return Draw(part, place)


@dataclass(frozen=True)
class Gathered:
    """What one pass over images leaves.

    Attributes:
        parts: the moments of the parts.
        features: float32 [k, d] on the device, of the images that come first in the random order.
        part, place: int64 [k], of these; see :class:`Draw`.
    """

    parts: list[Moments]
    features: Tensor
    part: np.ndarray
    place: np.ndarray

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)


def gather(
    features: Features,
    images: ImageSet,
    items: np.ndarray,
    drawn: Draw,
    ranks: Ranks,
    *,
    keep: int,
    batch_size: int | None = None,
    report: Callable[[int], None] | None = None,
) -> Gathered:
    """Moments of the features of ``items`` (int64 [k], ascending) of ``images`` by their parts, and the features of ``keep``.

    The ranks share the batches, and each gets the sums of all: the same but for rounding. ``report`` is called with the number of
    images after every batch.
    """
    kept_items = items[np.argsort(drawn.place[items])[:keep]]
    slot = np.full(len(images), -1)
    slot[kept_items] = np.arange(len(kept_items))
    batches, part_of = [], []
    for part in range(PARTS):
        for batch in split(items[drawn.part[items] == part], batch_size or features.batch_size):
            batches.append(batch)
            part_of.append(part)
    parts = [Moments.none(features.dim, features.device) for _ in range(PARTS)]
    kept = torch.zeros(len(kept_items), features.dim, device=features.device)
    for number, found in features.stream(images, batches, ranks):
        parts[part_of[number]] = parts[part_of[number]].merged(Moments.of(found))
        slots = torch.from_numpy(slot[batches[number]]).to(kept.device)
        kept[slots[slots >= 0]] = found[slots >= 0]
        if report is not None:
            report(len(found))
    if ranks.world_size > 1:
        parts = [_over_ranks(part) for part in parts]
        kept = _sum(kept)
    return Gathered(parts, kept, drawn.part[kept_items], drawn.place[kept_items])


def together(pieces: Sequence[Gathered], keep: int) -> Gathered:
    """Disjoint sets of images as one, with the features of the first ``keep`` images in the random order."""
    place = np.concatenate([piece.place for piece in pieces])
    kept = place < keep
    features = torch.cat([piece.features for piece in pieces])
    part = np.concatenate([piece.part for piece in pieces])
    parts = [merge([piece.parts[number] for piece in pieces]) for number in range(PARTS)]
    return Gathered(parts, features[torch.from_numpy(kept).to(features.device)], part[kept], place[kept])


def _over_ranks(moments: Moments) -> Moments:
    """The moments of all ranks' images together."""
    count = _sum(torch.tensor([float(moments.count)], dtype=torch.float64, device=moments.mean.device))
    mean = _sum(moments.mean * moments.count) / count.clamp(min=1)
    step = moments.mean - mean
    scatter = _sum(moments.scatter + moments.count * torch.outer(step, step))
    return Moments(int(count), mean, scatter)


def _sum(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    try:
        dist.all_reduce(values)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise SynthfastError(f"another rank has ended or cannot be reached; look for its message ({reason})") from error
    return values


def save_statistics(path: str, moments: Moments, features: Features) -> None:
    """Write mean and covariance as an npz file: ``mu`` [d], ``sigma`` [d, d] as pytorch-fid and EDM have them, in float64, and
    ``count`` and ``features`` (the fingerprint of the features)."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=moments.mean.cpu().numpy(),
        sigma=moments.covariance.cpu().numpy(),
        count=np.int64(moments.count),
        features=np.array(features.fingerprint),
    )
    atomic_write_bytes(path, buffer.getvalue())


def read_statistics(path: Path, features: Features) -> Moments:
    """Mean and covariance from an npz file with ``mu`` and ``sigma``, of this package or another; they must be those of
    ``features``, as far as the file tells. Where it holds no ``count``, a large one stands for it."""
    if not path.is_file():
        raise SynthfastError(f"{path}: no such file of statistics; check the path")
    arrays = read_npz(path, ("mu", "sigma"), ("count", "features"))
    mean, covariance = (np.array(arrays[name]) for name in ("mu", "sigma"))
    if (
        mean.ndim != 1
        or mean.dtype.kind != "f"
        or covariance.dtype.kind != "f"
        or covariance.shape != (*mean.shape, *mean.shape)
    ):
        found = f"{mean.dtype} {list(mean.shape)} and {covariance.dtype} {list(covariance.shape)}"
        raise SynthfastError(f"{path}: expected numbers mu [d] and sigma [d, d], found {found}; remake the file")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise SynthfastError(f"{path}: expected finite numbers, found NaN or infinity; remake the file")
    if mean.shape != (features.dim,):
        raise UsageError(
            f"{path}: expected statistics of {features.dim} features like {features.name}, found {mean.size}; give --features "
            "those that the file was made with"
        )
    if "features" in arrays and str(arrays["features"]) != features.fingerprint:
        raise UsageError(
            f"{path}: was made with other features than {features.name}, or other weights; give --features those, or make "
            "it again"
        )
    count = arrays.get("count", np.int64(1 << 40))
    if count.dtype.kind not in "iu" or count.ndim:
        raise SynthfastError(
            f"{path}: expected a whole number 'count', found {count.dtype} {list(count.shape)}; remake it"
        )
    count = int(count)
    if count < 2:
        raise SynthfastError(f"{path}: expected statistics of at least 2 images, found {count}; remake the file")
    to = {"dtype": torch.float64, "device": features.device}
    return Moments(count, torch.tensor(mean, **to), torch.tensor(covariance, **to) * (count - 1))
