"""A small convolutional classifier for small images, such as 8x8 digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class SmallCNNConfig:
    """Shape of a :class:`SmallCNN`.

    channels: of the images. classes: number of outputs. widths: channels of each stage; every stage but the first halves
    the resolution.
    """

    channels: int
    classes: int
    widths: tuple[int, ...] = (32, 64, 128)


class SmallCNN(nn.Module):
    """Stages of two 3x3 convolutions with batch norm and ReLU, global average pooling, one linear layer.

    Input: images float [N, C, H, W] in [-1, 1]. Output: logits float [N, classes].
    """

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        width = config.channels
        for stage, out in enumerate(config.widths):
            for stride in (1 if stage == 0 else 2, 1):
                layers += [nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                width = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, config.classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
