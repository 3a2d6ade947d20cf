"""What the classifiers share: normalisation of pixels, activation, convolutions, stem and initial weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS = ("relu", "swish")


class Normalize(nn.Module):
    """Images [N, C, H, W] to (x - mean) / std, channels_last; where mean is 0 and std 1, nothing is computed.

    mean, std: one number per channel. They belong to the description of a classifier and not to its state dict, so that the
    state dict has the names of the published architectures.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        # (x - mean) / std as shift + scale x is one pass instead of two. The device is named, because a classifier that is
        # about to be given weights is made on the meta device, and these are no weights.
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device="cpu")
        scale = torch.tensor([1 / s for s in std], device="cpu")
        self.register_buffer("shift", shift.view(1, -1, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(1, -1, 1, 1), persistent=False)
        self.is_identity = all(m == 0 for m in mean) and all(s == 1 for s in std)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return x if self.is_identity else torch.addcmul(self.shift, x, self.scale)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"


class SamePad(nn.Module):
    """Zeros around [N, C, H, W] for a 3x3 convolution of stride 2 without padding, as TensorFlow's "SAME" puts them.

    For an even size that is one row below and one column to the right, for an odd one also one above and one to the left:
    half the size, rounded up, comes out. DeepMind's networks were trained so.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1))


def activation_module(name: str) -> nn.Module:
    """ReLU, in place, or Swish, x * sigmoid(x), whose gradient needs its input."""
    return nn.ReLU(inplace=True) if name == "relu" else nn.SiLU()


def conv3x3(inputs: int, outputs: int, stride: int = 1, same: bool = False) -> nn.Conv2d:
    """A 3x3 convolution without bias; with ``same`` and stride 2 its input must have gone through :class:`SamePad`."""
    return nn.Conv2d(inputs, outputs, 3, stride, 0 if same and stride == 2 else 1, bias=False)


def stem_pool(stem_stride: int) -> nn.Module:
    """What follows a stem: nothing, or from a stride of 4 on the 3x3 max pooling of He et al. (2016)."""
    return nn.MaxPool2d(3, 2, 1) if stem_stride == 4 else nn.Identity()


def default_stem_stride(height: int, width: int) -> int:
    """The stride at which a network takes in its images: 1 below 64 pixels (longer side), 2 below 128, then 4.

    It keeps the first stage at 32x32 to 63x63 for images of 32 to 255 pixels. Stride 2 is that of the stem's 3x3 convolution;
    for 4 a max pooling follows it, as ResNets for ImageNet have.
    """
    longer = max(height, width)
    return 1 if longer < 64 else 2 if longer < 128 else 4


def initialize(model: nn.Module, device: torch.device) -> None:
    """Give a model that was made on the meta device its initial weights, from torch's global generator, in channels_last.

    Convolutions: normal, variance 2 / (outputs * kernel area), that is Kaiming normal with fan-out (He et al. 2015), as
    Wide ResNets and TRADES start. Batch norm: 1 and 0. Linear: torch's default (uniform within 1 / sqrt(inputs)), bias 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
            module.to_empty(device=device, recurse=False)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
            nn.init.zeros_(module.bias)
    model.to(device=device, memory_format=torch.channels_last)
