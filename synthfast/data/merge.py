"""``synthfast shards merge``: several shard folders into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from synthfast.config import MergeConfig
from synthfast.data.copying import Copied, Report, copy_to_shards, layout_of, shard_request
from synthfast.data.images import ImageSet, by_part
from synthfast.data.shard_set import ShardSet
from synthfast.errors import UsageError

_OPTIONS = {
    "n": "DIR ... (their images)",
    "shape": "DIR ... (their image shape)",
    "classes": "DIR ... (their classes)",
    "shard_size": "--shard-size",
    "format": "--format",
    "codec": "--codec",
    "quality": "--quality",
    "parts": "DIR ...",
    "synthfast": "the version of synthfast",
}


class Joined(ImageSet):
    """Sets of one shape and the same classes, one after the other, as one set."""

    def __init__(self, name: str, parts: Sequence[ImageSet]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        first = parts[0]
        for part in parts[1:]:
            if part.shape != first.shape:
                shapes = ["x".join(map(str, images.shape)) for images in (first, part)]
                raise UsageError(f"{part.name}: expected images {shapes[0]} as in {first.name}, found {shapes[1]}")
            if part.classes != first.classes:
                classes = ["no classes" if x.classes is None else f"{x.classes} classes" for x in (first, part)]
                raise UsageError(f"{part.name}: expected {classes[0]} as in {first.name}, found {classes[1]}")
        labels = None if first.labels is None else np.concatenate([part.labels for part in parts])
        super().__init__(name, first.shape, int(self.ends[-1]), labels, first.classes, first.class_names)

    def _read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape), np.uint8)
        for number, slots, rows in by_part(self.ends, indices):
            out[slots] = self.parts[number].read(rows)
        return out


def merge(config: MergeConfig, report: Report | None = None) -> Copied:
    """Write the images of all parts, in order, into the shard folder ``config.out``, or complete what an earlier run began.

    The manifest's request records each part's path, fingerprint, number of images and request.

    Raises:
        UsageError: parts of other shapes, classes or (without ``config.format``) formats, or a folder made from other parts.
        SynthfastError: a damaged part, or a disk at fault.
    """
    parts = [ShardSet(path) for path in config.parts]
    images = Joined(" + ".join(config.parts), parts)
    layouts = [layout_of(part, config.format, config.shard_size, config.codec, config.quality) for part in parts]
    for path, layout in zip(config.parts, layouts, strict=True):
        if (layout.format, layout.codec, layout.quality) != (layouts[0].format, layouts[0].codec, layouts[0].quality):
            raise UsageError(
                f"{path}: is stored in another way than {config.parts[0]}; say with --format how to store both"
            )
    request = shard_request(images, layouts[0], {"parts": [_part(part) for part in parts]})
    return copy_to_shards(images, str(config.out), request, options=_OPTIONS, report=report)


def _part(part: ShardSet) -> dict[str, Any]:
    facts = {"name": part.name, "fingerprint": part.fingerprint(), "n": len(part)}
    return {**facts, "original": part.manifest.request.values}
