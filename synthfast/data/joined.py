"""Several sets of images as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from synthfast.data.images import ImageSet, by_part
from synthfast.errors import UsageError


class Joined(ImageSet):
    """Sets of one shape and the same classes, one after the other, as one set."""

    def __init__(self, name: str, parts: Sequence[ImageSet]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        first = parts[0]
        for part in parts[1:]:
            if part.shape != first.shape:
                shapes = ["x".join(map(str, images.shape)) for images in (first, part)]
                raise UsageError(
                    f"{part.name}: expected images {shapes[0]} as in {first.name}, found {shapes[1]}; leave it out"
                )
            if part.classes != first.classes:
                classes = ["no classes" if x.classes is None else f"{x.classes} classes" for x in (first, part)]
                raise UsageError(
                    f"{part.name}: expected {classes[0]} as in {first.name}, found {classes[1]}; leave it out"
                )
        labels = None if first.labels is None else np.concatenate([part.labels for part in parts])
        super().__init__(name, first.shape, int(self.ends[-1]), labels, first.classes, first.class_names)
        self.lossy = any(part.lossy for part in parts)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape), np.uint8)
        for number, slots, rows in by_part(self.ends, indices):
            out[slots] = self.parts[number].read(rows)
        return out
