"""Sets of images of every kind that a loader meets, all of 9 x 12 pixels, and what a batch must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from synthfast.data import ArrayImages, Chosen, ImageSet, ShardFolder, ShardSet, open_images
from synthfast.data.loaders import Wanted
from synthfast.ops import reference_data

COUNT, SHAPE, CLASSES = 60, (9, 12, 3), 4


def smooth(count: int, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Images that compress, uint8 [count, H, W, C]."""
    random = np.random.default_rng(seed)
    height, width, channels = shape
    small = random.integers(0, 256, (count, 3, 4, channels), np.uint8)
    return np.stack([
        np.asarray(Image.fromarray(image.squeeze()).resize((width, height), Image.Resampling.BICUBIC)).reshape(shape)
        for image in small
    ])  # fmt: skip


def write_shards(path: Path, pixels: np.ndarray, labels: np.ndarray, **more: object) -> ShardSet:
    """A shard folder of several shards."""
    request = {"n": len(pixels), "shape": list(pixels.shape[1:]), "classes": CLASSES, "shard_size": 25, **more}
    with ShardFolder.create_or_resume(path, request) as folder:
        for span in folder.pending():
            with folder.writer(span.index) as writer:
                part = slice(span.first, span.first + span.count)
                writer.append(np.ascontiguousarray(pixels[part]), labels[part])
                writer.commit()
        folder.finish()
    return ShardSet(path)


def make_set(kind: str, path: Path) -> ImageSet:
    kind, grey = kind.removeprefix("grey "), kind.startswith("grey")
    pixels = smooth(COUNT, (*SHAPE[:2], 1 if grey else 3), seed=len(kind) + grey)
    labels = np.random.default_rng(len(kind)).integers(0, CLASSES, COUNT)
    labels[:CLASSES] = range(CLASSES)
    if kind in ("memory", "grey"):
        return ArrayImages("memory", [pixels], labels)
    if kind == "shards":
        return write_shards(path, pixels, labels)
    if kind == "planar":
        flat = pixels.transpose(0, 3, 1, 2).reshape(COUNT, -1)
        return ArrayImages("planar", [flat[:7], flat[7:]], labels, planar=SHAPE)
    if kind in ("png", "jpg"):
        return write_shards(
            path, pixels, labels, format="wds", codec=kind, **({"quality": 90} if kind == "jpg" else {})
        )
    if kind == "folder":
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            (path / str(label)).mkdir(parents=True, exist_ok=True)
            suffix, options = (("png", {}), ("jpg", {"quality": 80}), ("bmp", {}))[number % 3]
            Image.fromarray(image.squeeze()).save(path / str(label) / f"{number:03d}.{suffix}", **options)
        return open_images(f"folder:{path}")
    if kind == "tars":
        shards = write_shards(path, pixels, labels, format="wds", codec="png")
        assert len(shards.tar_paths) == 3
        return open_images(f"wds:{path}")
    if kind.startswith("chosen"):
        return Chosen(
            make_set(kind.removeprefix("chosen ").replace("chosen", "memory"), path), np.arange(COUNT)[5:55:2]
        )
    raise AssertionError(kind)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ImageSet]:
    """A set by its kind: memory, shards, planar, png, jpg, folder, tars; "chosen KIND" for a part of it, "grey KIND"."""
    known: dict[str, ImageSet] = {}

    def get(kind: str) -> ImageSet:
        if kind not in known:
            known[kind] = make_set(kind, tmp_path_factory.mktemp("set") / "images")
        return known[kind]

    return get


def shuffled(sets, counts, rank=0, ranks=1):
    """A plan of batches with so many images of each set, in shuffled orders, of which a rank gets its share."""
    orders = [np.random.default_rng(k).permutation(len(images)) for k, images in enumerate(sets)]
    size = sum(counts)

    def plan(step):
        items, first = [], 0
        for order, count in zip(orders, counts, strict=True):
            mine = np.arange((rank - first) % ranks, count, ranks)
            items.append(order[(step * count + mine) % len(order)])
            first += count
        return Wanted(tuple(items), step * size + np.arange(rank, size, ranks))

    return plan


def reference(sets, wanted, augment):
    """What every loader must give, by ``read`` and the plain operation."""
    pixels = np.concatenate([images.read(items) for images, items in zip(sets, wanted.items, strict=True)])
    labels = np.concatenate([images.labels[items] for images, items in zip(sets, wanted.items, strict=True)])
    pixels, labels = torch.from_numpy(pixels), torch.from_numpy(labels)
    if augment is None:
        return pixels, labels
    rows, index = torch.arange(len(pixels)), torch.from_numpy(wanted.index)
    x = reference_data.gather_augment(pixels, rows, index, augment.seed, padding=augment.crop, flip=augment.flip)
    return x, labels


def compare(loader, plan, first, last):
    """Batches ``first`` to ``last`` - 1 of a loader must be as they should."""
    batches = list(loader.batches(plan, first, last))
    assert len(batches) == last - first
    for number, (images, labels) in enumerate(batches, start=first):
        wanted_images, wanted_labels = reference(loader.sets, plan(number), loader.augment)
        assert torch.equal(images, wanted_images) and torch.equal(labels, wanted_labels), f"batch {number}"
        assert images.dtype == wanted_images.dtype and images.stride() == wanted_images.stride()


@pytest.fixture
def check():
    return compare


@pytest.fixture
def plan_of():
    return shuffled


@pytest.fixture
def write():
    return write_shards
