"""``synthfast shards stats``: facts about all images of a shard folder, from one pass over them in bounded memory."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from synthfast.config import StatsConfig
from synthfast.data.shards.shard_set import ShardSet
from synthfast.data.transfer.copying import Report, chunks

_SLICE = 1 << 18  # values that are turned into float64 at a time
_HASH_BYTES = 8  # among 50 million images two different ones agree with a chance of 1 in 15,000


def statistics(config: StatsConfig, report: Report | None = None) -> dict[str, Any]:
    """What the images are like, as JSON values. A hash of 8 bytes an image is kept, all else is summed up.

    ``mean`` and ``std`` are per channel, on pixels in [0, 1], over all pixels of all images; ``min`` and ``max`` per channel,
    from 0 to 255. ``duplicates`` is the share of images that equal an earlier one, ``constant_images`` counts those of one
    colour. ``bytes_per_image`` is on the disk, labels included. ``images_per_class`` is null without labels.
    """
    images = ShardSet(config.source[0])
    total, channels = len(images), images.shape[2]
    channel = _Channels(images.shape)
    hashes = np.empty(total, np.uint64)
    constant = 0
    tell = report or (lambda done, total: None)
    tell(0, total)
    for rows in chunks(images):
        pixels = images.read(rows)
        hashes[rows] = [_hash(image) for image in pixels]
        constant += _constant(pixels.reshape(len(rows), -1), channels)
        channel.add(pixels)
        tell(int(rows[-1]) + 1, total)
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
        **channel.to_json(),
        "duplicate_images": duplicates,
        "duplicates": duplicates / total,
        "constant_images": constant,
    }


class _Channels:
    """Sums over the pixels of each channel, exact: whole numbers below 2^53 in every slice and 2^63 in all."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        _, self._width, self._channels = shape
        self._count = 0
        self._sums, self._squares = np.zeros((2, self._channels), np.int64)
        self._low, self._high = np.full(self._channels, 255, np.uint8), np.zeros(self._channels, np.uint8)

    def add(self, pixels: np.ndarray) -> None:
        """uint8 [k, H, W, C]."""
        lines = pixels.reshape(-1, self._width * self._channels)  # long rows, which numpy reduces several times as fast
        self._count += pixels.size // self._channels
        step = max(1, _SLICE // lines.shape[1])
        for first in range(0, len(lines), step):
            part = lines[first : first + step]
            values = part.astype(np.float64)
            self._sums += self._fold(values.sum(0), np.add).astype(np.int64)
            self._squares += self._fold(np.einsum("ij,ij->j", values, values), np.add).astype(np.int64)
            self._low = np.minimum(self._low, self._fold(part.min(0), np.minimum))
            self._high = np.maximum(self._high, self._fold(part.max(0), np.maximum))

    def _fold(self, columns: np.ndarray, how: np.ufunc) -> np.ndarray:
        """[W * C] to [C]."""
        return how.reduce(columns.reshape(-1, self._channels), 0)

    def to_json(self) -> dict[str, list[float]]:
        n = self._count
        pairs = list(zip(self._sums.tolist(), self._squares.tolist(), strict=True))
        return {
            "mean": [total / n / 255 for total, _ in pairs],
            "std": [(n * squares - total * total) ** 0.5 / n / 255 for total, squares in pairs],
            "min": self._low.tolist(),
            "max": self._high.tolist(),
        }


def _constant(rows: np.ndarray, channels: int) -> int:
    """How many images, uint8 [k, H * W * C], have one colour: every pixel is the one before it."""
    maybe = (rows[:, -channels:] == rows[:, :channels]).all(1)
    rows = rows[maybe]
    return int((rows[:, channels:] == rows[:, :-channels]).all(1).sum())


def _hash(image: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(image, digest_size=_HASH_BYTES).digest(), "little")
