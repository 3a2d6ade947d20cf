"""Which images a training step sees, as a function of the seed and the step alone: resuming needs no loader state."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from synthfast import ops
from synthfast.data import ImageSet

Batch = TypeVar("Batch")


class EpochOrder:
    """Endless shuffled passes over ``count`` items: position p is item p mod count of pass p div count."""

    def __init__(self, count: int, seed: int, stream: int = 0) -> None:
        self.count, self._entropy = count, (seed % 2**64, stream)
        self._passes: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            self._passes[number] = self._draw(np.random.default_rng([*self._entropy, number]))
            if len(self._passes) > 2:  # a batch touches two passes at most where it is smaller than the set
                self._passes.popitem(last=False)
        return self._passes[number]

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        """The items of a pass: int64 [count]."""
        return random.permutation(self.count)

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The items at positions start to stop: int64 [stop - start]."""
        parts, at = [], positions.start
        while at < positions.stop:
            number, offset = divmod(at, self.count)
            part = self._pass(number)[offset : offset + positions.stop - at]
            parts.append(part)
            at += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def read_batch(images: ImageSet, items: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Images as uint8 [N, H, W, C] and labels as int64 [N] (or None), on the CPU."""
    labels = None if images.labels is None else torch.from_numpy(images.labels[items])
    return torch.from_numpy(images.read(items)), labels


def to_model(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [N, H, W, C] to float32 [N, C, H, W] in [-1, 1], channels_last, on ``device``; the bytes are what travels."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_unit(
    images: Tensor,
    device: torch.device,
    index: Tensor | None = None,
    seed: int = 0,
    *,
    crop: int = 0,
    flip: bool = False,
) -> Tensor:
    """uint8 [N, H, W, C] to float32 [N, C, H, W] in [0, 1], channels_last, on ``device``, as classifiers take them.

    With ``crop`` padded by so many zero pixels and cropped at random, with ``flip`` mirrored with probability 1/2, decided by
    ``seed`` and ``index`` (int64 [N] on the device) alone.
    """
    rows = torch.arange(len(images), device=device)
    index = rows if index is None else index
    return ops.gather_augment(images.to(device, non_blocking=True), rows, index, seed, padding=crop, flip=flip)


def flip_half(images: Tensor, index: Tensor, seed: int) -> Tensor:
    """Mirror each of [N, C, H, W] with probability 1/2, decided by (seed, index) alone."""
    uniform = ops.philox_uniform_(torch.empty(len(images), 1, device=images.device), index, seed, ops.Stream.AUGMENT)
    return torch.where((uniform < 0.5).view(-1, 1, 1, 1), images.flip(3), images)


def prefetch(make: Callable[[int], Batch], first: int, last: int, ahead: int = 2) -> Iterator[Batch]:
    """``make(first)`` to ``make(last - 1)`` in order, computed by one background thread up to ``ahead`` items early."""
    with ThreadPoolExecutor(1) as pool:
        waiting: collections.deque[Future[Batch]] = collections.deque()
        step = first
        try:
            while waiting or step < last:
                while step < last and len(waiting) <= ahead:
                    waiting.append(pool.submit(make, step))
                    step += 1
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
