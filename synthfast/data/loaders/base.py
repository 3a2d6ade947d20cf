"""What loaders have in common: the caller says which images, a loader brings them ahead of time, cropped, mirrored, scaled."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from synthfast import ops
from synthfast.data.images import ImageSet
from synthfast.data.machine import usable_cpus
from synthfast.errors import UsageError
from synthfast.parallel import prefetch


@dataclass(frozen=True)
class Augment:
    """Random crops and flips of the images of a batch, as :func:`synthfast.ops.gather_augment` draws them.

    seed: key of the run.
    crop: zero pixels around an image before a part of its size is cut out at random; 0 for no crop.
    flip: whether to mirror half of the images.
    """

    seed: int = 0
    crop: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Wanted:
    """The images of one batch.

    items: for each set of the loader the images from it, int64 [k] in [0, its size); the batch is one set after the other.
    index: int64 [n], what keys the crop and the flip of each image of the batch; None where the loader does not augment.
    """

    items: tuple[np.ndarray, ...]
    index: np.ndarray | None = None

    def __len__(self) -> int:
        return sum(map(len, self.items))


class Batch(NamedTuple):
    """Images and their labels, int64 [n] (None unless all sets have some), on the loader's device."""

    images: Tensor
    labels: Tensor | None


Plan = Callable[[int], Wanted]
Batches = Generator[Batch, None, None]


class Loader(ABC):
    """Batches from one or more sets of images of one shape. All loaders give the same batches for the same plan.

    Args:
        sets: what the batches are drawn from.
        device: where they are wanted.
        augment: with it images are float32 [n, C, H, W] in [0, 1], channels_last, cropped and mirrored; without it they are
            uint8 [n, H, W, C] as they are stored.

    Attributes:
        kind: "device", "dali" or "torch".
    """

    kind: ClassVar[str]

    def __init__(self, sets: Sequence[ImageSet], device: torch.device, augment: Augment | None = None) -> None:
        shapes = list(dict.fromkeys(images.shape for images in sets))
        if len(shapes) != 1:
            found = ", ".join(map(str, map(list, shapes))) or "no set"
            raise UsageError(f"a loader needs images of one shape, found {found}; choose sets that fit")
        self.sets, self.device, self.augment = tuple(sets), device, augment
        self.shape = shapes[0]

    @abstractmethod
    def batches(self, plan: Plan, first: int, last: int) -> Batches:
        """The batches ``plan(first)`` to ``plan(last - 1)``, in order, a few of them prepared ahead.

        ``plan`` may be called on another thread, with ascending numbers. Closing the iterator ends processes and threads.

        Raises:
            SynthfastError: an image cannot be read; the message names it.
        """

    def batch(self, wanted: Wanted) -> Batch:
        """One batch by itself."""
        (batch,) = self.batches(lambda _: wanted, 0, 1)
        return batch

    def _labels(self, wanted: Wanted) -> Tensor | None:
        parts = []
        for images, items in zip(self.sets, wanted.items, strict=True):
            if images.labels is None:
                return None
            parts.append(images.labels[items])
        return self._pinned(torch.from_numpy(np.concatenate(parts)))

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _finished(self, pixels: Tensor, labels: Tensor | None, wanted: Wanted, *, augmented: bool = False) -> Batch:
        """A batch from uint8 [n, H, W, C] on any device, in the order of ``wanted``; crops and flips may be done already."""
        pixels = pixels.to(self.device, non_blocking=True)
        labels = None if labels is None else labels.to(self.device, non_blocking=True)
        if self.augment is None:
            return Batch(pixels, labels)
        rows = torch.arange(len(pixels), device=self.device)
        return Batch(self._augmented(pixels, rows, wanted, Augment() if augmented else self.augment), labels)

    def _augmented(self, pixels: Tensor, rows: Tensor, wanted: Wanted, augment: Augment) -> Tensor:
        """The images ``rows`` of ``pixels``, both on the device, as ``augment`` says."""
        index = rows
        if augment.crop or augment.flip:
            assert wanted.index is not None, "a loader that augments needs the index of every image"
            index = torch.from_numpy(wanted.index).to(self.device, non_blocking=True)
        return ops.gather_augment(pixels, rows, index, augment.seed, padding=augment.crop, flip=augment.flip)


class ReadingLoader(Loader):
    """A loader that reads bytes in a background thread and finishes batches on the caller's."""

    def batches(self, plan: Plan, first: int, last: int) -> Batches:
        def read(number: int) -> tuple[Wanted, Tensor, Tensor | None]:
            wanted = plan(number)
            return wanted, self._pinned(self._read(wanted)), self._labels(wanted)

        for wanted, pixels, labels in prefetch(read, first, last):
            yield self._finished(pixels, labels, wanted)

    def _read(self, wanted: Wanted) -> Tensor:
        """uint8 [n, H, W, C] on the CPU."""
        return read_bytes(self.sets, wanted.items)


def read_bytes(sets: Sequence[ImageSet], items: Sequence[np.ndarray]) -> Tensor:
    """``items`` of each set, one set after the other: uint8 [n, H, W, C]."""
    parts = [images.read(some) for images, some in zip(sets, items, strict=True) if len(some)]
    if len(parts) == 1:
        return torch.from_numpy(parts[0])
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty((0, *sets[0].shape), np.uint8))


def cpus_of_rank() -> int:
    """CPUs for each of the ranks that torchrun started on this machine."""
    return max(1, usable_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
