"""``synthfast shards stats``: facts about all images of a shard folder, from one pass over them in bounded memory."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from synthfast.config import StatsConfig
from synthfast.data.copying import Report, chunks
from synthfast.data.shard_set import ShardSet

_HASH_BYTES = 8  # among 50 million images two different ones agree with a chance of 1 in 15,000


def statistics(config: StatsConfig, report: Report | None = None) -> dict[str, Any]:
    """What the images are like, as JSON values. A hash of 8 bytes an image is kept, all else is summed up.

    ``mean`` and ``std`` are per channel, on pixels in [0, 1], over all pixels of all images; ``min`` and ``max`` per channel,
    from 0 to 255. ``duplicates`` is the share of images that equal an earlier one, ``constant_images`` counts those of one
    colour. ``bytes_per_image`` is on the disk, labels included. ``images_per_class`` is null without labels.
    """
    images = ShardSet(config.source[0])
    total, channels = len(images), images.shape[2]
    sums, squares = np.zeros(channels, np.uint64), np.zeros(channels, np.uint64)
    low, high = np.full(channels, 255, np.uint8), np.zeros(channels, np.uint8)
    hashes = np.empty(total, np.uint64)
    constant = 0
    tell = report or (lambda done, total: None)
    tell(0, total)
    for rows in chunks(images):
        pixels = images.read(rows)
        hashes[rows] = [_hash(image) for image in pixels]
        constant += int((pixels == pixels[:, :1, :1]).all((1, 2, 3)).sum())
        flat = pixels.reshape(-1, channels)
        low, high = np.minimum(low, flat.min(0)), np.maximum(high, flat.max(0))
        sums += flat.sum(0, dtype=np.uint64)
        squares += np.square(flat, dtype=np.uint16).sum(0, dtype=np.uint64)
        tell(int(rows[-1]) + 1, total)
    pixels_of_channel = total * images.shape[0] * images.shape[1]
    duplicates = total - len(np.unique(hashes))
    stored = sum(file.bytes for entry in images.manifest.shards for file in entry.files)
    return {
        "path": config.source[0],
        "n": total,
        "shape": list(images.shape),
        "classes": images.classes,
        "images_per_class": None
        if images.labels is None
        else np.bincount(images.labels, minlength=images.classes).tolist(),
        "bytes": stored,
        "bytes_per_image": stored / total,
        "mean": [int(s) / pixels_of_channel / 255 for s in sums],
        "std": [_std(int(s), int(q), pixels_of_channel) for s, q in zip(sums, squares, strict=True)],
        "min": low.tolist(),
        "max": high.tolist(),
        "duplicate_images": duplicates,
        "duplicates": duplicates / total,
        "constant_images": constant,
    }


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(image, digest_size=_HASH_BYTES).digest(), "little")


def _std(total: int, squares: int, count: int) -> float:
    """The standard deviation on [0, 1] from exact sums of values from 0 to 255."""
    return (count * squares - total * total) ** 0.5 / count / 255
