"""Which loader brings the images: the one that was named, or the fastest that can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from synthfast.config.fields import LOADERS
from synthfast.data.images import Chosen, ImageSet
from synthfast.data.loaders.base import Augment, Batches, Loader, Wanted, cpus_of_rank
from synthfast.data.loaders.dali import DaliLoader
from synthfast.data.loaders.device import does_not_fit, in_arrays, open_device
from synthfast.data.loaders.encoded import encoded_images, is_plain
from synthfast.data.loaders.pipelines import import_dali
from synthfast.data.loaders.workers import TorchLoader
from synthfast.data.shards.shard_set import ShardSet
from synthfast.errors import UsageError


def open_loader(
    kind: str,
    sets: Sequence[ImageSet],
    device: torch.device,
    augment: Augment | None = None,
    *,
    workers: int | None = None,
    once: bool = False,
) -> Loader:
    """The loader of a kind.

    Args:
        kind: device, dali, torch, or auto: device for sets in arrays that fit into the device's memory (on a CPU they may be
            memory-mapped and of any size), dali where it is installed for folders of png or jpg files and for shards of jpg,
            else torch. Shards of png are decoded by threads of this process, which is faster than DALI.
        sets, device, augment: see :class:`Loader`.
        workers: processes of torch, threads of dali; if not given one for each CPU, and none for torch where a thread is enough.
        once: the images are wanted once, so that auto and device copy no set into the device's memory.

    Raises:
        UsageError: a loader that is not installed, or sets that are not for it.
    """
    if kind == "auto":
        kind = _fastest(sets, device, once)
    if kind == "device":
        return open_device(sets, device, augment, once=once)
    if kind == "dali":
        return DaliLoader(sets, device, augment, workers)
    if kind == "torch":
        if workers is None:
            workers = 0 if all(map(_reads_fast, sets)) else cpus_of_rank()
        return TorchLoader(sets, device, augment, workers)
    raise UsageError(f"--loader {kind}: no such loader; expected {', '.join(LOADERS)}")


def stream(
    images: ImageSet,
    batches: Sequence[np.ndarray],
    device: torch.device,
    augment: Augment | None = None,
    *,
    kind: str = "auto",
    workers: int | None = None,
) -> Batches:
    """Batches of one set that is read through once: the images ``batches`` (int64 [k] each), in their order."""
    loader = open_loader(kind, [images], device, augment, workers=workers, once=True)
    if isinstance(loader, DaliLoader) and augment in (None, Augment()) and _is_one_pass(images, batches):
        assert isinstance(images, ShardSet)
        return loader.in_order(images, len(batches[0]))
    return loader.batches(lambda number: Wanted((batches[number],)), 0, len(batches))


def _is_one_pass(images: ImageSet, batches: Sequence[np.ndarray]) -> bool:
    """Whether ``batches`` are all of a shard folder of tars in order, each but the last of one size."""
    if not (isinstance(images, ShardSet) and images.format == "wds" and batches):
        return False
    size, count = len(batches[0]), len(images)
    if len(batches) != -(-count // size):
        return False
    return all(np.array_equal(part, np.arange(k * size, min(k * size + size, count))) for k, part in enumerate(batches))


def _fastest(sets: Sequence[ImageSet], device: torch.device, once: bool) -> str:
    if all(map(in_arrays, sets)):
        if device.type == "cpu":
            return "device"
        return "torch" if once or does_not_fit(sets, device) is not None else "device"
    slow = [images for images in sets if not _reads_fast(images)]
    return "dali" if slow and all(map(_decodable, slow)) and _has_dali() else "torch"


def _has_dali() -> bool:
    try:
        import_dali()
    except UsageError:
        return False
    return True


def _reads_fast(images: ImageSet) -> bool:
    """Whether a thread of this process brings the images of a set sooner than worker processes or DALI."""
    if isinstance(images, Chosen):
        return _reads_fast(images.images)
    return in_arrays(images) or (isinstance(images, ShardSet) and images.codec == "png")


def _decodable(images: ImageSet) -> bool:
    """Whether DALI decodes the files of a set, as far as the first one tells."""
    encoded = encoded_images(images)
    return encoded is not None and images.shape[2] in (1, 3) and is_plain(encoded(np.array([0]))[0], images.shape)
