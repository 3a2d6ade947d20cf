"""What every source of images looks like to the rest of the package, and the kind that lives in arrays."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

from synthfast.errors import SynthfastError


class ImageSet(ABC):
    """Images of one size, read by index.

    Attributes:
        name: how errors and reports call the set.
        shape: (H, W, C), C being 1 (grey) or 3 (RGB) in every set but a shard folder, which may hold others.
        labels: int64 [n] in [0, classes), or None for a set without labels.
        classes: the number of classes, or None.
        class_names: one name per class, or None where the source has no names.
        lossy: whether lossy coding (jpg, webp) has left its traces in the pixels.
    """

    name: str
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    classes: int | None
    class_names: tuple[str, ...] | None
    lossy: bool = False

    def __init__(
        self,
        name: str,
        shape: tuple[int, int, int],
        count: int,
        labels: np.ndarray | None = None,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        if count < 1:
            raise SynthfastError(f"{name}: holds no images, expected at least 1; check the source")
        self.name, self.shape, self._count = name, shape, count
        self.labels = None if labels is None else checked_labels(labels, count, classes, name)
        if self.labels is not None and classes is None:
            classes = int(self.labels.max()) + 1
        self.classes = classes
        self.class_names = None if class_names is None else tuple(class_names)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        height, width, channels = self.shape
        classes = "no labels" if self.classes is None else f"{self.classes} classes"
        return f"<{self.name}: {len(self)} images {height}x{width}x{channels}, {classes}>"

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images at ``indices`` (integers [k] in [0, n), any order, repeats allowed): uint8 [k, H, W, C].

        The result is C-contiguous and the caller's own. Several threads may read at once.
        """
        return self._read(self._checked(indices))

    def _checked(self, indices: np.ndarray) -> np.ndarray:
        """Indices as int64 [k]; errors as ``read`` has them."""
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise TypeError(f"indices: expected integers [k], found {indices.dtype} {list(indices.shape)}")
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices must be in [0, {len(self)}), found {indices.min()} to {indices.max()}")
        return indices.astype(np.int64, copy=False)

    @abstractmethod
    def _read(self, indices: np.ndarray) -> np.ndarray:
        """``read`` after its checks."""

    def fingerprint(self) -> str:
        """SHA-256 that tells whether two sets hold the same: here of shape, pixels in order, and labels.

        Reads every image. A set that cannot afford this overrides it and says what it hashes instead.
        """
        digest = hashlib.sha256(repr((len(self), self.shape, self.classes)).encode())
        for first in range(0, len(self), 8192):
            digest.update(self._read(np.arange(first, min(first + 8192, len(self)))))
        if self.labels is not None:
            digest.update(self.labels.astype("<i8", copy=False))
        return digest.hexdigest()


class ArrayImages(ImageSet):
    """Images in one or more uint8 arrays, in memory or memory-mapped, seen as one set.

    ``parts`` are arrays [n_i, H, W, C]. With ``planar`` they are [n_i, C * H * W] of ``shape``, channel by channel, as
    the CIFAR and downsampled ImageNet files store them; pixels are put in order when read, so nothing is copied before.

    Attributes:
        arrays: the parts as uint8 [n_i, H, W, C]; empty where they are planar.
    """

    def __init__(
        self,
        name: str,
        parts: Sequence[np.ndarray],
        labels: np.ndarray | None = None,
        classes: int | None = None,
        class_names: Sequence[str] | None = None,
        *,
        planar: tuple[int, int, int] | None = None,
    ) -> None:
        # asarray drops np.memmap's subclass (still mapped), whose indexing is several times slower.
        self._parts = [np.asarray(part) for part in parts]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self._planar = planar
        self.arrays = [] if planar else self._parts
        shape = planar or tuple(self._parts[0].shape[1:])
        super().__init__(name, shape, int(self._ends[-1]), labels, classes, class_names)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        rows = np.empty((len(indices), *self._parts[0].shape[1:]), np.uint8)
        for number, slots, places in by_part(self._ends, indices):
            rows[slots] = self._parts[number][places]
        if self._planar is None:
            return rows
        height, width, channels = self._planar
        return np.ascontiguousarray(rows.reshape(-1, channels, height, width).transpose(0, 2, 3, 1))


class Chosen(ImageSet):
    """Some images of another set, by their indices there (int64 [n]), or with other labels (int64 [n], of these images).

    Attributes:
        images, items: the other set, and the indices.
    """

    def __init__(
        self, images: ImageSet, items: np.ndarray, labels: np.ndarray | None = None, classes: int | None = None
    ) -> None:
        self.images, self.items = images, items
        if labels is None:
            labels, classes = None if images.labels is None else images.labels[items], images.classes
        super().__init__(images.name, images.shape, len(items), labels, classes, images.class_names)
        self.lossy = images.lossy

    def _read(self, indices: np.ndarray) -> np.ndarray:
        return self.images.read(self.items[indices])


def by_part(ends: np.ndarray, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of a set in parts that end at ``ends`` (int64): for each part that ``indices`` (int64 [k]) touch its number, the
    places in ``indices`` that touch it, and the rows of the part that they mean."""
    part_of = np.searchsorted(ends, indices, side="right")
    order = np.argsort(part_of, kind="stable")
    used, starts = np.unique(part_of[order], return_index=True)
    for number, start, stop in zip(used.tolist(), starts, [*starts[1:], len(order)], strict=False):
        slots = order[start:stop]
        yield number, slots, indices[slots] - (ends[number - 1] if number else 0)


def checked_labels(labels: np.ndarray, count: int, classes: int | None, name: str) -> np.ndarray:
    """``labels`` as int64 [count]; a one-line error if there are fewer or more, or one is outside [0, classes)."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        found = f"{labels.dtype} {list(labels.shape)}"
        raise SynthfastError(
            f"{name}: labels must be integers [{count}], one per image, found {found}; check the source"
        )
    labels = np.ascontiguousarray(labels, np.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        limit = "0 or more" if classes is None else f"in [0, {classes - 1}]"
        raise SynthfastError(f"{name}: labels must be {limit}, found {low} to {high}; check the source")
    return labels
