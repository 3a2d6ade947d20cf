"""The two networks of a GAN: a ResNet that makes images, and a projection discriminator with spectral normalisation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthfast import ops
from synthfast.errors import UsageError
from synthfast.models.spectral_norm import SpectralConv2d, start_iteration

_SMALLEST = 4  # images are halved while that leaves at least so many pixels
_WIDEST = 512
_GROUP = 16  # channels in a group of group norm


@dataclass(frozen=True)
class GANConfig:
    """What builds both networks.

    image_size, channels: of the square images, from 8 pixels on.
    num_classes: of a class-conditional GAN; None without labels.
    latent: size of the noise vector, and of the class vectors.
    width: channels at the full resolution; each halving of the resolution doubles them, up to 512.
    """

    image_size: int
    channels: int
    num_classes: int | None
    latent: int = 64
    width: int = 64

    def __post_init__(self) -> None:
        least = {"image_size": 2 * _SMALLEST, "channels": 1, "num_classes": 1, "latent": 1, "width": _GROUP}
        for name, smallest in least.items():
            value = getattr(self, name)
            if (type(value) is not int or value < smallest) and (name != "num_classes" or value is not None):
                raise UsageError(f"{name} {value!r}: expected a whole number of at least {smallest} for a GAN")
        if self.width % _GROUP:
            raise UsageError(f"width {self.width}: expected a multiple of {_GROUP} for a GAN")

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(pixels a side, channels) from the full resolution down; an odd side is halved upwards."""
        levels = [(self.image_size, self.width)]
        while (levels[-1][0] + 1) // 2 >= _SMALLEST:
            size, width = levels[-1]
            levels.append(((size + 1) // 2, min(2 * width, max(_WIDEST, self.width))))
        return levels

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Generator(nn.Module):
    """Noise z [N, latent] and labels to images [N, C, H, W] in (-1, 1).

    From the lowest resolution up, a residual block a level (Miyato and Koyama 2018, https://arxiv.org/abs/1802.05637). Each
    normalisation is a group norm over one image, scaled and shifted by linear functions of z and the class's vector. Batch norm
    would make images depend on the others of a batch while training, and its running statistics would not be those of the
    averaged weights.
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        (self.size, inputs), *above = reversed(config.levels)
        self.embedding = None if config.num_classes is None else nn.Embedding(config.num_classes, config.latent)
        condition = config.latent * (1 if self.embedding is None else 2)
        self.start = nn.Linear(condition, inputs * self.size**2)
        self.blocks = nn.ModuleList()
        for size, outputs in above:
            self.blocks.append(_UpBlock(inputs, outputs, size))
            inputs = outputs
        self.norm = _Norm(inputs)
        self.last = nn.Conv2d(inputs, config.channels, 3, padding=1)
        self.norms = [module for module in self.modules() if isinstance(module, _Norm)]
        # One product for the scales and shifts of all norms.
        self.modulation = nn.Linear(condition, sum(2 * norm.channels for norm in self.norms))
        self.to(memory_format=torch.channels_last)

    def init_weights(self, random: torch.Generator) -> Generator:
        """Orthogonal weights (Brock et al. 2019), biases 0, class vectors N(0, 1), drawn from ``random``; returns the network."""
        _initialize(self, random)
        with torch.no_grad():
            self.modulation.weight.mul_(0.5)
        return self

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """z float [N, latent], labels int64 [N] (None without classes) -> float [N, C, H, W], channels_last."""
        condition = z if self.embedding is None else torch.cat([z, self.embedding(labels)], 1)
        modulations = self.modulation(condition).split([2 * norm.channels for norm in self.norms], 1)
        pairs = iter(modulations)
        x = self.start(condition).view(len(z), self.size, self.size, -1).permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x, next(pairs), next(pairs))
        return self.last(self.norm(x, next(pairs))).float().tanh()


class _Norm(nn.Module):
    """Group norm over each image, scale and shift of its own, ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.groups = channels, channels // _GROUP

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [N, C, H, W]; modulation [N, 2 C]: scales minus 1, then shifts."""
        scale, shift = modulation[:, :, None, None].chunk(2, 1)
        return torch.addcmul(shift, F.group_norm(x, self.groups), 1 + scale).relu_()


class _UpBlock(nn.Module):
    """A residual block that doubles the resolution to ``size`` (one pixel less where that is odd)."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm1, self.norm2 = _Norm(inputs), _Norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        h = self.conv1(self._up(self.norm1(x, first)))
        h = self.conv2(self.norm2(h, second))
        return self._up(self.skip(x)) + h  # a 1x1 convolution and the repetition of pixels commute

    def _up(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")[:, :, : self.size, : self.size]


class Discriminator(nn.Module):
    """Images [N, C, H, W] in [-1, 1] and labels to a number each: large for real.

    D(x, y) = <e_y, phi(x)> + psi(phi(x)) (Miyato and Koyama 2018, eq. 8), phi the sum over the pixels of a ResNet's last layer.
    Every convolution is spectrally normalised; call :func:`synthfast.models.spectral_norm.power_iteration` once a step. The last
    layer is not: on digits a discriminator bound to be 1-Lipschitz as a whole stays near 0, and the generator learns one image a
    class (after 800 steps a classifier trained on the samples had 86% of real digits right, and 90% with a free last layer).
    """

    def __init__(self, config: GANConfig) -> None:
        super().__init__()
        self.config = config
        levels = config.levels
        blocks: list[nn.Module] = []
        inputs = config.channels
        for level, (_, outputs) in enumerate(levels):
            blocks.append(_DownBlock(inputs, outputs, first=level == 0, down=level < len(levels) - 1))
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, 1)
        self.embedding = None if config.num_classes is None else nn.Embedding(config.num_classes, inputs)
        self.to(memory_format=torch.channels_last)

    def init_weights(self, random: torch.Generator) -> Discriminator:
        """As :meth:`Generator.init_weights`, with class vectors about as long as N(0, 1) gives 64 channels."""
        _initialize(self, random)
        if self.embedding is not None:
            with torch.no_grad():
                self.embedding.weight.mul_((64 / self.embedding.embedding_dim) ** 0.5)
        start_iteration(self, random)
        return self

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """x float [N, C, H, W], labels int64 [N] (None without classes) -> float32 [N]."""
        features = self.blocks(x).relu().sum((2, 3))
        value = self.linear(features).squeeze(1).float()
        if self.embedding is not None:
            value = value + (self.embedding(labels) * features.float()).sum(1)
        return value


class _DownBlock(nn.Module):
    """A residual block; with ``down`` it halves the resolution, upwards where it is odd. The first has no ReLU before it."""

    def __init__(self, inputs: int, outputs: int, first: bool, down: bool) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.conv1 = SpectralConv2d(inputs, outputs, 3)
        self.conv2 = SpectralConv2d(outputs, outputs, 3)
        self.skip = SpectralConv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x if self.first else x.relu())
        h = self.conv2(h.relu_())
        shortcut = self._pool(x)  # before the 1x1 convolution, with which it commutes
        return self._pool(h) + (shortcut if self.skip is None else self.skip(shortcut))

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True) if self.down else x


@torch.no_grad()
def _initialize(network: nn.Module, random: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Drawn on the CPU, so that the same seed gives the same weights on every device.
            drawn = torch.empty(module.weight.shape)
            module.weight.copy_(nn.init.orthogonal_(drawn, generator=random))
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=random))


def small_gan_config(
    image_size: int, channels: int, num_classes: int | None, *, latent: int = 64, width: int | None = None
) -> GANConfig:
    """Networks to train from scratch; ``width`` None: 32 up to 16 pixels a side, 128 up to 32, else 64."""
    if width is None:
        width = 32 if image_size <= 16 else 128 if image_size <= 32 else 64
    return GANConfig(image_size, channels, num_classes, latent, width)


def latents(config: GANConfig, index: Tensor, seed: int, stream: ops.Stream = ops.Stream.NOISE) -> Tensor:
    """Noise vectors float32 [N, latent] of the images ``index`` int64 [N]: each depends on the seed and its index alone."""
    return ops.philox_normal_(torch.empty(len(index), config.latent, device=index.device), index, seed, stream)


@torch.no_grad()
def draw_images(network: Generator, index: Tensor, labels: Tensor | None, seed: int) -> Tensor:
    """Images float32 [N, C, H, W] in (-1, 1): image i from the seed, index i and label i alone."""
    return network(latents(network.config, index, seed), labels)
