"""Which images a training step sees, as a function of the seed and the step alone: resuming needs no loader state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from synthfast import ops
from synthfast.data import ImageSet


class EpochOrder:
    """Endless shuffled passes over ``count`` items: position p is item p mod count of pass p div count.

    The pass that was asked for last is kept in memory, 4 bytes an item (8 from 2^31 items on).
    """

    def __init__(self, count: int, seed: int, stream: int = 0) -> None:
        self.count, self._entropy = count, (seed % 2**64, stream)
        self._kept: tuple[int, np.ndarray] | None = None

    def _pass(self, number: int) -> np.ndarray:
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # before another one is drawn
            self._kept = number, self._draw(np.random.default_rng([*self._entropy, number]))
        return self._kept[1]

    def _draw(self, random: np.random.Generator) -> np.ndarray:
        """The items of a pass: integers [count]."""
        return self._shuffled(random)

    def _shuffled(self, random: np.random.Generator) -> np.ndarray:
        """What ``random.permutation(count)`` gives, in as few bytes as hold it."""
        items = np.arange(self.count, dtype=np.int32 if self.count < 2**31 else np.int64)
        random.shuffle(items)
        return items

    def __getitem__(self, positions: slice) -> np.ndarray:
        """The items at positions start to stop: int64 [stop - start]."""
        parts, at = [], positions.start
        while at < positions.stop:
            number, offset = divmod(at, self.count)
            part = self._pass(number)[offset : offset + positions.stop - at].astype(np.int64)
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
