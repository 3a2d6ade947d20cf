"""ResNet-18 and -34 for small images (He et al. 2016, "Deep residual learning for image recognition")."""

from __future__ import annotations

from torch import Tensor, nn

from synthfast.models.classifier_parts import Normalize, activation_module, conv3x3, stem_pool

# Depth to the number of blocks in each of the four stages.
RESNET_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
RESNET_WIDTHS = (64, 128, 256, 512)


class Block(nn.Module):
    """act(bn(conv(act(bn(conv(x))))) + shortcut(x)), the shortcut a 1x1 convolution and batch norm where sizes change."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        self.activation = activation_module(activation)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(self.conv1(x)))
        return self.activation(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """A 3x3 stem, four stages of widths 64 to 512 of which the last three halve the resolution, average pooling, linear.

    Input: images float [N, C, H, W] in [0, 1]. Output: logits float [N, classes]. The state dict has the names of
    RobustBench's ``resnet.ResNet``.

    Args:
        depth: 18 or 34.
        channels, classes: of images and logits.
        mean, std: of the pixels, one number per channel.
        activation: "relu" or "swish".
        stem_stride: see :func:`~synthfast.models.classifier_parts.default_stem_stride`.
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        classes: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        activation: str = "relu",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        inputs = RESNET_WIDTHS[0]
        self.conv1 = conv3x3(channels, inputs, min(stem_stride, 2))
        self.bn1 = nn.BatchNorm2d(inputs)
        self.activation = activation_module(activation)
        self.pool = stem_pool(stem_stride)
        for stage, (outputs, count) in enumerate(zip(RESNET_WIDTHS, RESNET_BLOCKS[depth], strict=True), start=1):
            blocks = []
            for block in range(count):
                blocks.append(Block(inputs, outputs, 2 if stage > 1 and block == 0 else 1, activation))
                inputs = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.activation(self.bn1(self.conv1(self.normalize(x)))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))
