"""Wide ResNets for small images (Zagoruyko and Komodakis 2016, "Wide residual networks")."""

from __future__ import annotations

from torch import Tensor, nn

from synthfast.models.classifier_parts import Normalize, SamePad, activation_module, conv3x3, stem_pool

WIDE_VARIANTS = ("trades", "deepmind")


class WideBlock(nn.Module):
    """conv(act(bn(conv(a)))) + x, a = act(bn(x)); where the width changes, a projected by a 1x1 convolution instead of x."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, variant: str) -> None:
        super().__init__()
        same = variant == "deepmind"
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride, same)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.activation = activation_module(activation)
        self.pad: nn.Module = SamePad() if same and stride == 2 else nn.Identity()
        self.has_projection = inputs != outputs
        if self.has_projection:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut = self.convShortcut(out) if self.has_projection else x
        out = self.conv1(self.pad(out))
        return self.conv2(self.activation(self.bn2(out))) + shortcut


class WideStage(nn.Module):
    """A sequence of blocks, named ``layer`` as in RobustBench's weights."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int, activation: str, variant: str) -> None:
        super().__init__()
        blocks = [
            WideBlock(inputs if k == 0 else outputs, outputs, stride if k == 0 else 1, activation, variant)
            for k in range(count)
        ]
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-depth-width: a 3x3 stem of 16 channels, three stages of widths 16, 32, 64 times ``width`` of which the last two
    halve the resolution, batch norm and activation, average pooling, linear.

    Input: images float [N, C, H, W] in [0, 1]. Output: logits float [N, classes]. The state dict has the names of
    RobustBench's ``wide_resnet.WideResNet``. There is no dropout.

    Args:
        depth: 6 n + 4, for n blocks a stage.
        width: factor of the stages' widths.
        channels, classes: of images and logits.
        mean, std: of the pixels, one number per channel.
        activation: "relu" or "swish".
        variant: "trades", with convolutions padded alike on all sides (Zhang et al. 2019), or "deepmind", with those of
            stride 2 padded below and to the right (Gowal et al. 2020, RobustBench: DMWideResNet).
        stem_stride: see :func:`~synthfast.models.classifier_parts.default_stem_stride`.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        channels: int,
        classes: int,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        activation: str = "relu",
        variant: str = "trades",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        count, widths = (depth - 4) // 6, (16, 16 * width, 32 * width, 64 * width)
        self.normalize = Normalize(mean, std)
        self.conv1 = conv3x3(channels, widths[0], min(stem_stride, 2))
        self.pool = stem_pool(stem_stride)
        self.block1 = WideStage(count, widths[0], widths[1], 1, activation, variant)
        self.block2 = WideStage(count, widths[1], widths[2], 2, activation, variant)
        self.block3 = WideStage(count, widths[2], widths[3], 2, activation, variant)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.activation = activation_module(activation)
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.conv1(self.normalize(x)))
        out = self.block3(self.block2(self.block1(out)))
        return self.fc(self.activation(self.bn1(out)).mean((2, 3)))
