"""``synthfast shards import``: images from any source into a shard folder."""

from __future__ import annotations

from pathlib import Path

from synthfast.config import ImportConfig
from synthfast.data.images import ImageSet
from synthfast.data.sources.names import open_images
from synthfast.data.transfer.copying import Copied, Layout, Report, copy_to_shards, origin_of, shard_request
from synthfast.data.transfer.npz_stream import NpzStream
from synthfast.errors import UsageError

OPTIONS = {
    "n": "SOURCE (its images)",
    "shape": "SOURCE (its image shape)",
    "classes": "--classes",
    "shard_size": "--shard-size",
    "format": "--format",
    "codec": "--codec",
    "quality": "--quality",
    "source.name": "SOURCE",
    "source.fingerprint": "SOURCE (its images)",
    "synthfast": "the version of synthfast",
}


def import_images(config: ImportConfig, report: Report | None = None) -> Copied:
    """Write the images of ``config.source`` into the shard folder ``config.out``, or complete what an earlier run began.

    Pixels and labels stay exactly as they are, unless ``config.image_size`` or the jpg codec change the pixels. The manifest's
    request names the source and its fingerprint; that of a shard folder also the request that it was made for.

    Raises:
        UsageError: no such source, or a folder that was made from another.
        SynthfastError: damaged or hostile data, or a disk at fault.
    """
    images = _open(config)
    layout = Layout(config.shard_size, config.format, config.codec, config.quality)
    request = shard_request(images, layout, origin_of(images, config.source[0]))
    return copy_to_shards(images, str(config.out), request, options=OPTIONS, report=report)


def open_in_order(source: str, data_dir: str, *, download: bool = False, image_size: int | None = None) -> ImageSet:
    """A source of images that is read once from front to back: as ``open_images``, but that no npz file is read whole."""
    if source.startswith("npz:") and image_size is None:
        return NpzStream(Path(source.removeprefix("npz:")), source)
    return open_images(source, data_dir=Path(data_dir), download=download, image_size=image_size)


def _open(config: ImportConfig) -> ImageSet:
    source = config.source[0]
    images = open_in_order(source, config.data_dir, download=config.download, image_size=config.image_size)
    if config.classes is not None and config.classes != images.classes:
        if images.labels is None:
            raise UsageError(f"--classes {config.classes}: {source} has no labels; leave it out")
        found = int(images.labels.max()) + 1
        if found > config.classes:
            raise UsageError(f"--classes {config.classes}: {source} has labels up to {found - 1}; raise it")
        images.classes = config.classes
    return images
