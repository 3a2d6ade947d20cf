"""A small convolutional classifier for small images, such as 8x8 digits."""

from __future__ import annotations

from torch import Tensor, nn

from synthfast.models.classifier_parts import Normalize, activation_module


class SmallCNN(nn.Module):
    """Stages of two 3x3 convolutions with batch norm and ReLU, global average pooling, one linear layer.

    Input: images float [N, C, H, W] in [0, 1]. Output: logits float [N, classes].

    Args:
        channels: of the images.
        classes: number of outputs.
        widths: channels of each stage; every stage but the first halves the resolution.
        activation: "relu" or "swish".
        mean, std: of the pixels, one number per channel.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        widths: tuple[int, ...] = (32, 64, 128),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        layers: list[nn.Module] = []
        inputs = channels
        for stage, outputs in enumerate(widths):
            for stride in (1 if stage == 0 else 2, 1):
                layers += [
                    nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(outputs),
                    activation_module(activation),
                ]
                inputs = outputs
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.normalize(x)).mean((2, 3)))
