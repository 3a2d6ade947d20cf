"""Pre-activation ResNet-18 and -34 for small images (He et al. 2016, "Identity mappings in deep residual networks")."""

from __future__ import annotations

from torch import Tensor, nn

from synthfast.models.classifier_parts import Normalize, SamePad, activation_module, conv3x3, stem_pool
from synthfast.models.resnet import RESNET_BLOCKS, RESNET_WIDTHS

PREACT_VARIANTS = ("final-norm", "plain", "deepmind")


class PreActBlock(nn.Module):
    """conv(act(bn(conv(a)))) + shortcut, a = act(bn(x)); what the shortcut is where sizes change depends on the variant."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str, variant: str) -> None:
        super().__init__()
        same = variant == "deepmind"
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride, same)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.activation = activation_module(activation)
        self.pad: nn.Module = SamePad() if same and stride == 2 else nn.Identity()
        self.projects = "nothing"
        if stride != 1 or inputs != outputs:
            self.projects = "activated" if variant == "final-norm" else "input"
            projection = (
                conv3x3(inputs, outputs, stride, same) if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            )
            self.shortcut = nn.Sequential(projection)  # a sequence of one, for the name that RobustBench's weights have

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.bn1(x))
        shortcut = x
        if self.projects == "activated":
            shortcut = self.shortcut(out)
        elif self.projects == "input":
            shortcut = self.shortcut(self.pad(x))
        out = self.conv1(self.pad(out))
        return self.conv2(self.activation(self.bn2(out))) + shortcut


class PreActResNet(nn.Module):
    """A 3x3 stem, four stages of widths 64 to 512 of which the last three halve the resolution, average pooling, linear.

    Input: images float [N, C, H, W] in [0, 1]. Output: logits float [N, classes]. The state dict has the names of
    RobustBench's ``resnet.PreActResNet``.

    Args:
        depth: 18 or 34.
        channels, classes: of images and logits.
        mean, std: of the pixels, one number per channel.
        activation: "relu" or "swish".
        variant: "final-norm" is the network of the paper: batch norm and activation before the pooling, shortcuts project the
            activated input (RobustBench: bn_before_fc with out_shortcut or PreActBlockV2). "plain" has no batch norm before
            the pooling, and shortcuts project the input as it is (RobustBench: PreActBlock alone). "deepmind" is that of
            Gowal et al. (2020, RobustBench: DMPreActResNet): batch norm and activation before the pooling, shortcuts are 3x3
            convolutions of the input as it is, and convolutions of stride 2 are padded below and to the right.
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
        variant: str = "final-norm",
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        inputs = RESNET_WIDTHS[0]
        self.conv1 = conv3x3(channels, inputs, min(stem_stride, 2))
        self.pool = stem_pool(stem_stride)
        for stage, (outputs, count) in enumerate(zip(RESNET_WIDTHS, RESNET_BLOCKS[depth], strict=True), start=1):
            blocks = []
            for block in range(count):
                blocks.append(PreActBlock(inputs, outputs, 2 if stage > 1 and block == 0 else 1, activation, variant))
                inputs = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.has_final_norm = variant != "plain"
        if self.has_final_norm:
            self.bn = nn.BatchNorm2d(inputs)
            self.activation = activation_module(activation)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pool(self.conv1(self.normalize(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        if self.has_final_norm:
            out = self.activation(self.bn(out))
        return self.linear(out.mean((2, 3)))
