"""Generators that are worse than the embedded one in a known way: ``--generator py:bench.experiments.controls:blurred``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from synthfast import ops
from synthfast.config import SampleConfig
from synthfast.sampling import Generator, load_generator

BLUR = 0.5  # share of a pixel's value that comes from its neighbours, each way
NOISE = 0.2  # standard deviation on pixels in [-1, 1]


@dataclass
class Changed:
    """Another generator's images after ``change(images, index, seed)``."""

    name: str
    source: Generator
    change: Callable[[Tensor, Tensor, int], Tensor]
    concurrent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.shape, self.classes = self.source.shape, self.source.classes
        self.facts = {"change": self.name, "blur": BLUR, "noise": NOISE}

    def sample(self, index: Tensor, labels: Tensor | None, seed: int) -> Tensor:
        return self.change(self.source.sample(index, labels, seed), index, seed)


def blurred(device: torch.device) -> Changed:
    """Each pixel mixed with its neighbours, along both axes."""
    return Changed("blurred", load_generator(SampleConfig(), device), _blur)


def noisy(device: torch.device) -> Changed:
    """Normal noise on every pixel."""
    return Changed("noisy", load_generator(SampleConfig(), device), _add_noise)


def _blur(images: Tensor, index: Tensor, seed: int) -> Tensor:
    weights = torch.tensor([BLUR / 2, 1 - BLUR, BLUR / 2], device=images.device)
    kernel = torch.outer(weights, weights).expand(images.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])


def _add_noise(images: Tensor, index: Tensor, seed: int) -> Tensor:
    noise = ops.philox_normal_(torch.empty_like(images), index, seed, ops.Stream.AUGMENT)
    return images.clamp(-1, 1) + NOISE * noise
