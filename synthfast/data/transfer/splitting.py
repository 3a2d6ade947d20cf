"""``synthfast shards split``: a shard folder into several."""

from __future__ import annotations

import itertools

import numpy as np

from synthfast.config import SplitConfig
from synthfast.data.images import Chosen
from synthfast.data.shards.shard_set import ShardSet
from synthfast.data.transfer.copying import Copied, Report, copy_to_shards, layout_of, origin_of, shard_request
from synthfast.errors import UsageError

_STREAM = 31
_OPTIONS = {
    "n": "--parts, --sizes",
    "shape": "DIR (its image shape)",
    "classes": "DIR (its classes)",
    "shard_size": "--shard-size",
    "format": "--format",
    "codec": "--codec",
    "quality": "--quality",
    "source.name": "DIR",
    "source.fingerprint": "DIR (its images)",
    "split.part": "--parts, --sizes",
    "split.sizes": "--parts, --sizes",
    "split.shuffle": "--shuffle",
    "split.seed": "--seed",
    "split.balanced": "--balanced",
    "synthfast": "the version of synthfast",
}


def split(config: SplitConfig, report: Report | None = None) -> list[Copied]:
    """Write the parts into the shard folders ``config.out``-0, -1 and so on, or complete what an earlier run began.

    Every image is in one part. Each part's request records the folder, its fingerprint and request, and how it was split.

    Raises:
        UsageError: sizes that do not add up to all images, or a folder made by another command.
        SynthfastError: a damaged folder, or a disk at fault.
    """
    images = ShardSet(config.source[0])
    sizes = part_sizes(config, len(images))
    order = split_order(images.labels, len(images), config)
    layout = layout_of(images, config.format, config.shard_size, config.codec, config.quality)
    origin = origin_of(images, config.source[0])
    tell = report or (lambda done, total: None)
    prefix = str(config.out).rstrip("/") or "/"  # a folder's name, as shells complete it
    results, first = [], 0
    for k, size in enumerate(sizes):
        how = {"part": k, "sizes": sizes, "shuffle": config.shuffle, "balanced": config.balanced}
        if config.shuffle:
            how["seed"] = config.seed
        items = order[first : first + size]
        part = Chosen(images, items if config.shuffle else np.sort(items))
        request = shard_request(part, layout, {"split": how, **origin})
        base = first

        def tell_all(done: int, total: int, base: int = base) -> None:
            tell(base + done, len(images))

        results.append(copy_to_shards(part, f"{prefix}-{k}", request, options=_OPTIONS, report=tell_all))
        first += size
    return results


def part_sizes(config: SplitConfig, n: int) -> list[int]:
    """How many of ``n`` images each part gets. Cuts between shares lie where their sum times ``n`` is rounded to."""
    if config.parts is not None:
        parts = min(config.parts, n + 1)  # one of these is empty already, and refused below
        cuts = [k * n // parts for k in range(parts + 1)]
    else:
        given = config.given_sizes
        if isinstance(given[0], int):
            if sum(given) != n:
                raise UsageError(f"--sizes {config.sizes}: add up to {sum(given):,}, expected {n:,}, all images")
            return list(given)
        cuts = [round(total * n) for total in itertools.accumulate(given[:-1], initial=0.0)] + [n]
    sizes = [stop - start for start, stop in itertools.pairwise(cuts)]
    if min(sizes) < 1:
        option = f"--parts {config.parts}" if config.parts is not None else f"--sizes {config.sizes}"
        raise UsageError(f"{option}: a part would get none of the {n:,} images; take fewer or larger parts")
    return sizes


def split_order(labels: np.ndarray | None, n: int, config: SplitConfig) -> np.ndarray:
    """All images' numbers, int64 [n], in the order in which parts are cut.

    Balanced, the images of each class are spread evenly over the whole: the r-th of the m images of a class (in their order, or a
    random one) has its place at (r + 1/2) / m.
    """
    order = np.arange(n)
    if config.shuffle:
        order = np.random.default_rng([config.seed % 2**64, _STREAM]).permutation(n)
    if not config.balanced:
        return order
    if labels is None:
        raise UsageError(f"--balanced: {config.source[0]} has no labels to balance; leave it out")
    place = np.empty(n)
    by_class = order[np.argsort(labels[order], kind="stable")]
    for rows in np.split(by_class, np.cumsum(np.bincount(labels))[:-1]):
        place[rows] = (np.arange(len(rows)) + 0.5) / max(len(rows), 1)
    return order[np.argsort(place[order], kind="stable")] if config.shuffle else np.lexsort((labels, place))
