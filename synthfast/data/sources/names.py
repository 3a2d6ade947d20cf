"""One name for every source of images: ``digits``, ``cifar10:test``, ``folder:DIR``, ``npz:FILE``, a shard folder and so on."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from synthfast.data.formats.npy import image_shape, read_npz
from synthfast.data.images import ArrayImages, ImageSet
from synthfast.data.shards.manifest import MANIFEST
from synthfast.data.shards.shard_set import ShardSet
from synthfast.data.sources import published
from synthfast.data.sources.cifar_binary import open_cifar_binary
from synthfast.data.sources.files import open_folder
from synthfast.data.sources.published import Wanted
from synthfast.data.sources.tar_images import TAR_SUFFIXES, TarImages
from synthfast.data.storage.places import is_url, place
from synthfast.errors import SynthfastError, UsageError

DEFAULT_DATA_DIR = Path("data")


@dataclass(frozen=True)
class Declared:
    """What is known of a published set before it is opened; what is found must agree."""

    open: Callable[[Wanted], ImageSet]
    classes: int | None
    shape: tuple[int, int, int] | None  # None: resized to the wanted size, RGB
    splits: tuple[str, ...] = ("train", "test")


NAMED = {
    "digits": Declared(published.open_digits, 10, (8, 8, 1)),
    "mnist": Declared(published.open_mnist, 10, (28, 28, 1)),
    "cifar10": Declared(partial(published.open_cifar, classes=10), 10, (32, 32, 3)),
    "cifar100": Declared(partial(published.open_cifar, classes=100), 100, (32, 32, 3)),
    "celeba": Declared(published.open_celeba, None, None, ("train", "valid", "test")),
    "imagenet": Declared(published.open_imagenet, 1000, None),
}
DEFAULT_IMAGE_SIZE = 64  # of the sets that are resized

# What a path is the path of: from path, source and image size (where images are resized) to the set.
PATHS: dict[str, Callable[[str, str, int | None], ImageSet]] = {
    "folder": lambda path, source, image_size: _open_image_folder(path, source, image_size),
    "npz": lambda path, source, image_size: open_npz(Path(path), source),
    "cifar-binary": lambda path, source, image_size: open_cifar_binary(Path(path), source),
    "wds": lambda path, source, image_size: TarImages(path, source, image_size=image_size),
}


def open_images(
    source: str,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    split: str | None = None,
) -> ImageSet:
    """Open a source of images by name.

    Args:
        source: ``digits`` (embedded), ``mnist``, ``cifar10``, ``cifar100``, ``celeba`` or ``imagenet``, each with
            ``:train`` (default) or ``:test``, celeba also ``:valid``; ``folder:DIR`` (one subfolder per class, or flat
            and unlabelled); ``npz:FILE`` (``image`` uint8 [n, H, W] or [n, H, W, C], ``label`` integers [n] or none);
            ``cifar-binary:PATH`` (a file of CIFAR's binary version, or a folder of ``data_batch_1.bin`` and so on);
            ``wds:PATH`` (a WebDataset tar, a folder of them, or a pattern such as ``wds:train-*.tar``); or the path or URL of
            a shard folder.
        data_dir: where the published sets are looked for and downloaded to; ``data`` by default.
        download: fetch a missing published set through torchvision.
        image_size: side of the square that celeba and imagenet (64 by default), folders and WebDataset tars (as they are by
            default) are resized to. Sets of fixed size accept only their own.
        split: the split, where ``source`` names none.

    Raises:
        UsageError: a name or a combination of options that cannot mean anything.
        SynthfastError: missing, damaged or unexpected data.
    """
    name, colon, tail = source.partition(":")
    if colon and name in PATHS:
        _no_split(source, split)
        if "://" in tail:
            raise UsageError(
                f"{source}: expected a local path, found a URL, where only shard folders are read; fetch it first"
            )
        return _same_size(PATHS[name](tail, source, image_size), image_size)
    if name in NAMED:
        if colon and split is not None and tail != split:
            raise UsageError(f"{source}: names a split, and split '{split}' was asked for as well; give one of the two")
        split = tail if colon else split or "train"
        return _open_named(name, split, data_dir or DEFAULT_DATA_DIR, download, image_size)
    _no_split(source, split)
    return _same_size(_open_path(source), image_size)


def _open_image_folder(path: str, source: str, image_size: int | None) -> ImageSet:
    folder = Path(path)
    if (folder / MANIFEST).is_file() and any(folder.glob("shard-000000.*")):
        raise UsageError(
            f"{source}: {path} is a shard folder, of which folder: would read the preview alone; write {path}"
        )
    return open_folder(folder, source, image_size=image_size)


def open_npz(path: Path, name: str) -> ImageSet:
    """Arrays ``image`` and, where there, ``label`` of an npz file; stored (not deflated) ones stay on disk."""
    if not os.path.isfile(path):
        raise SynthfastError(f"{path}: no such npz file; check the path")
    arrays = read_npz(path, ("image",), ("label",))
    image = arrays["image"]
    image_shape(image.dtype, image.shape, path)
    return ArrayImages(name, [image if image.ndim == 4 else image[..., None]], arrays.get("label"))


def _open_named(name: str, split: str, data_dir: Path, download: bool, image_size: int | None) -> ImageSet:
    declared = NAMED[name]
    if split not in declared.splits:
        raise UsageError(f"{name}:{split}: no such split; {name} has {', '.join(declared.splits)}")
    if declared.shape is None:
        image_size = DEFAULT_IMAGE_SIZE if image_size is None else image_size
        if image_size < 1:
            raise UsageError(f"{name}: the image size must be at least 1, found {image_size}")
    images = declared.open(Wanted(Path(data_dir), split, download, image_size or 0))
    shape = declared.shape or (image_size, image_size, 3)
    if images.shape != shape:
        raise SynthfastError(
            f"{images.name}: expected images {_times(shape)}, found {_times(images.shape)}; check the files"
        )
    found = None if images.labels is None else len(np.unique(images.labels))
    if found != declared.classes:
        hint = "; for a part of it use folder:DIR" if name == "imagenet" else "; check the files"
        raise SynthfastError(f"{images.name}: expected {declared.classes} classes, found {found}{hint}")
    return _same_size(images, image_size)


def _open_path(source: str) -> ImageSet:
    if is_url(source):
        return ShardSet(source)
    path = Path(place(source))
    if os.path.exists(path / MANIFEST):  # unlike a Path it takes a name that is too long for one that is not there
        return ShardSet(source)
    if os.path.isdir(path):
        raise UsageError(
            f"{source}: a folder without {MANIFEST} is no shard folder; for a folder of images write folder:{source}"
        )
    if path.suffix == ".npz" and os.path.isfile(path):
        raise UsageError(f"{source}: for an npz file write npz:{source}")
    if path.name.endswith(TAR_SUFFIXES) and os.path.isfile(path):
        raise UsageError(f"{source}: for a WebDataset tar write wds:{source}")
    names = ", ".join(NAMED)
    raise UsageError(
        f"{source}: no such image source; expected {names}, folder:DIR, npz:FILE, cifar-binary:PATH, wds:PATH or a shard folder"
    )


def _no_split(source: str, split: str | None) -> None:
    if split is not None:
        raise UsageError(f"{source}: has no splits, '{split}' was asked for; name the source of that split instead")


def _same_size(images: ImageSet, image_size: int | None) -> ImageSet:
    if image_size is not None and images.shape[:2] != (image_size, image_size):
        raise UsageError(
            f"{images.name}: images are {_times(images.shape)} and are not resized, image size {image_size} was asked "
            "for; leave the image size out"
        )
    return images


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
