"""The loader ``device``: whole sets of bytes where the batches are made, which is then one pass over memory.

On a GPU the images of all sets lie on the card as one uint8 array, copied there once. On a CPU arrays in memory and memory-mapped
files stay where they are; only images that must be decoded are read into memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from synthfast.data.images import ArrayImages, Chosen, ImageSet
from synthfast.data.loaders.base import Augment, Batch, Batches, Loader, Plan, ReadingLoader, Wanted, read_bytes
from synthfast.data.shards.shard_set import ShardSet
from synthfast.errors import SynthfastError, UsageError
from synthfast.parallel import prefetch

_FILLED = 0.8  # share of the free memory that images may take; the rest is for the training
_CHUNK = 1 << 26  # bytes read at once
_PAGE = 4096


class ResidentLoader(Loader):
    """Batches out of one uint8 array [M, H, W, C] on the device that holds all the sets."""

    kind = "device"

    def __init__(
        self,
        sets: Sequence[ImageSet],
        device: torch.device,
        augment: Augment | None = None,
        *,
        rows: Tensor | None = None,
        places: Sequence[np.ndarray | int] | None = None,
    ) -> None:
        """``rows``, ``places``: an array that holds the images already, and for each set where its images are in it: indices,
        or the first of them."""
        super().__init__(sets, device, augment)
        self._rows = rows
        self._places = np.cumsum([0, *map(len, sets[:-1])]).tolist() if places is None else places

    def batches(self, plan: Plan, first: int, last: int) -> Batches:
        if first >= last:
            return
        if self._rows is None:  # a run that is finished needs none
            self._rows = resident(self.sets, self.device)
        held = self._rows
        pixels = held.numpy().reshape(len(held), -1) if held.device.type == "cpu" else None

        def look_up(number: int) -> tuple[Wanted, Tensor, Tensor | None]:
            wanted = plan(number)
            parts = [
                place[items] if isinstance(place, np.ndarray) else items + place
                for place, items in zip(self._places, wanted.items, strict=True)
            ]
            rows = torch.from_numpy(np.concatenate(parts))
            if pixels is not None:
                _fetch(pixels, rows)
            return wanted, self._pinned(rows), self._labels(wanted)

        for wanted, rows, labels in prefetch(look_up, first, last):
            rows = rows.to(self.device, non_blocking=True)
            labels = None if labels is None else labels.to(self.device, non_blocking=True)
            if self.augment is None:
                yield Batch(held[rows], labels)
            else:
                yield Batch(self._augmented(held, rows, wanted, self.augment), labels)


class MappedLoader(ReadingLoader):
    """Sets that stay where they are, such as arrays in memory: their bytes are gathered into a batch, which is then
    augmented in one pass."""

    kind = "device"


def open_device(
    sets: Sequence[ImageSet], device: torch.device, augment: Augment | None = None, *, once: bool = False
) -> Loader:
    """The loader ``device``; UsageError where the images do not fit into the free memory. Sets that are wanted ``once`` stay
    where they are."""
    if device.type == "cpu" and all(map(in_arrays, sets)):
        found = [_single_array(images) for images in sets]
        if len(found) == 1 and found[0] is not None:
            array, items = found[0]
            return ResidentLoader(sets, device, augment, rows=_tensor(array), places=[0 if items is None else items])
        return MappedLoader(sets, device, augment)
    if once:
        return MappedLoader(sets, device, augment)
    problem = does_not_fit(sets, device)
    if problem is not None:
        raise UsageError(f"--loader device: {problem}; take --loader dali or torch")
    return ResidentLoader(sets, device, augment)


def in_arrays(images: ImageSet) -> bool:
    """Whether a set lies in arrays, in memory or memory-mapped, so that reading it decodes nothing."""
    if isinstance(images, Chosen):
        return in_arrays(images.images)
    return isinstance(images, ArrayImages) or bool(_arrays(images))


def does_not_fit(sets: Sequence[ImageSet], device: torch.device) -> str | None:
    """Why the sets do not fit into the free memory of the device, in words; None if they do, or nobody knows."""
    needed, free = sum(len(images) * math.prod(images.shape) for images in sets), free_memory(device)
    if free is None or needed <= _FILLED * free:
        return None
    return (
        f"the images take {needed / 1e9:.1f} GB, expected at most {_FILLED:.0%} of the memory that is free on {device}, found "
        f"{free / 1e9:.1f} GB free"
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that could be allocated; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None


def resident(sets: Sequence[ImageSet], device: torch.device) -> Tensor:
    """All images of the sets, one set after the other: uint8 [M, H, W, C] on the device, read in chunks of bounded size.

    Raises SynthfastError where they do not fit into the free memory.
    """
    problem = does_not_fit(sets, device)
    if problem is not None:
        raise SynthfastError(f"{', '.join(images.name for images in sets)}: {problem}; take fewer images")
    shape = sets[0].shape
    rows = torch.empty((sum(map(len, sets)), *shape), dtype=torch.uint8, device=device)
    step, at = max(1, _CHUNK // math.prod(shape)), 0
    for images in sets:
        for first in range(0, len(images), step):
            chunk = read_bytes([images], [np.arange(first, min(first + step, len(images)))])
            rows[at : at + len(chunk)] = chunk
            at += len(chunk)
    return rows


def _single_array(images: ImageSet) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The one array that holds a set, and which of its images are in it (None: all, in order); None if it takes more."""
    if isinstance(images, Chosen):
        found = _single_array(images.images)
        if found is None:
            return None
        array, items = found
        return array, images.items if items is None else items[images.items]
    arrays = _arrays(images)
    return (arrays[0], None) if len(arrays) == 1 and arrays[0].flags.c_contiguous else None


def _arrays(images: ImageSet) -> list[np.ndarray]:
    """The arrays uint8 [n_i, H, W, C] that hold a set in order; none where it is stored otherwise."""
    return images.arrays if isinstance(images, (ArrayImages, ShardSet)) else []


def _tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor on the same memory, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _fetch(images: np.ndarray, rows: Tensor) -> None:
    """Touch every page of some images, so that the system reads what is not in memory yet."""
    offsets = [*range(0, images.shape[1], _PAGE), images.shape[1] - 1]
    images[rows.numpy()[:, None], offsets].sum()
