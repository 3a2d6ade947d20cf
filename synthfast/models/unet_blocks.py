"""Parts of the U-Net.

Tensors [N, C, H, W] stay in channels_last memory from block to block. Sub-module names are those of
diffusers, so that its published weights load without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synthfast.models.unet_config import UNet2DConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


class GroupNormAct(nn.GroupNorm):
    """Group normalisation, optionally scaled and shifted per sample, then the activation."""

    def __init__(self, groups: int, channels: int, eps: float, act_fn: str) -> None:
        super().__init__(groups, channels, eps)
        self.activation = ACTIVATIONS[act_fn]

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """x [N, C, H, W]; scale, shift [N or 1, C, 1, 1] or neither -> act(norm(x) * (1 + scale) + shift)."""
        x = super().forward(x)
        if scale is not None:
            x = torch.addcmul(shift, x, 1 + scale)
        return self.activation(x)


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of t at geometrically spaced frequencies.

    Ho et al. 2020, https://arxiv.org/abs/2006.11239. With n = dim // 2 frequency i is
    10000 ** (-i / (n - freq_shift)).
    """

    def __init__(self, dim: int, freq_shift: float, flip_sin_to_cos: bool) -> None:
        super().__init__()
        self.dim = dim
        self.freq_shift = freq_shift
        self.flip_sin_to_cos = flip_sin_to_cos

    def forward(self, t: Tensor) -> Tensor:
        """t float32 [M] -> float32 [M, dim]; an odd last column is zero."""
        half = self.dim // 2
        # Made here and not kept as a buffer: model.to(bfloat16) would round a buffer's frequencies.
        exponent = torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.freq_shift)
        phase = t[:, None] * torch.exp(-math.log(10000) * exponent)
        parts = (phase.cos(), phase.sin()) if self.flip_sin_to_cos else (phase.sin(), phase.cos())
        return F.pad(torch.cat(parts, dim=1), (0, self.dim % 2))


class FourierEmbedding(nn.Module):
    """Sines and cosines of log t at fixed random frequencies.

    Song et al. 2021, https://arxiv.org/abs/2011.13456.
    """

    weight: Tensor

    def __init__(self, features: int, scale: float = 16.0) -> None:
        super().__init__()
        self.scale = scale
        # A buffer: the frequencies are part of the weights file, but are not trained.
        self.register_buffer("weight", torch.randn(features) * scale)

    def forward(self, t: Tensor) -> Tensor:
        """t > 0, float32 [M] -> float32 [M, 2 * features]."""
        phase = t.log()[:, None] * self.weight * (2 * math.pi)
        return torch.cat((phase.sin(), phase.cos()), dim=1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierEmbedding:
        # Phases reach hundreds of radians, so frequencies rounded to half precision would be other
        # frequencies: follow a move to another device, never one to another precision.
        exact = self.weight
        super()._apply(fn, recurse)
        if self.weight.dtype != exact.dtype:
            self.weight = exact.to(self.weight.device)
        return self


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear: from sines and cosines to the embedding that conditions the residual blocks."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features)
        self.linear_2 = nn.Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a skip; optionally halves or doubles the resolution in between.

    The embedding enters after the first convolution: added before the second normalisation ("default"), or as
    scale and shift after it ("scale_shift").
    """

    def __init__(
        self,
        config: UNet2DConfig,
        in_channels: int,
        out_channels: int,
        resample: Callable[[Tensor], Tensor] | None = None,
        output_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.resample = resample
        self.output_scale = output_scale
        norm = partial(GroupNormAct, config.norm_num_groups, eps=config.norm_eps, act_fn=config.act_fn)
        self.norm1 = norm(channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.embedding_dim, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = norm(channels=out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [N, C, H, W]; embedding [N or 1, D], already activated -> [N, C', H', W']."""
        h = self.norm1(x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        condition = self.time_emb_proj(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h, scale, shift)
        else:
            # In place here and below: no gradient needs a convolution's output, and a new tensor costs time.
            h = self.norm2(h.add_(condition))
        h = self.conv2(self.dropout(h))
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h if self.output_scale == 1 else h / self.output_scale


class Attention(nn.Module):
    """Self-attention between the positions of an image, with a skip."""

    def __init__(
        self, channels: int, head_dim: int | None, groups: int | None, eps: float, output_scale: float = 1.0
    ) -> None:
        super().__init__()
        head_dim = head_dim or channels
        self.heads = channels // head_dim
        self.output_scale = output_scale
        inner = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        h = x if self.group_norm is None else self.group_norm(x)
        tokens = h.flatten(2).transpose(1, 2)  # [N, H * W, C]: a view of channels_last memory, as are those below
        q, k, v = (
            project(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.to_out[0](h.transpose(1, 2).flatten(2))
        h = h.transpose(1, 2).unflatten(2, x.shape[2:]) + x
        return h if self.output_scale == 1 else h / self.output_scale


class Downsample(nn.Module):
    """3x3 convolution with stride 2."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))  # right and bottom only, as in DDPM's TensorFlow code
        return self.conv(x)


class Upsample(nn.Module):
    """Every pixel doubled in both directions, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(double(x))


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halve(x: Tensor) -> Tensor:
    """Mean over 2x2 pixels."""
    return F.avg_pool2d(x, 2)


class DownBlock(nn.Module):
    """Residual blocks at one resolution, each with attention if asked for, then the step to the lower one."""

    def __init__(
        self, config: UNet2DConfig, in_channels: int, out_channels: int, attention: bool, downsample: bool
    ) -> None:
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(
            ResnetBlock(config, in_channels if i == 0 else out_channels, out_channels) for i in range(layers)
        )
        self.attentions = _attentions(config, out_channels, layers if attention else 0)
        self.downsamplers = nn.ModuleList()
        if downsample and attention and config.downsample_type == "resnet":
            self.downsamplers.append(ResnetBlock(config, out_channels, out_channels, resample=halve))
        elif downsample:
            self.downsamplers.append(Downsample(out_channels, config.downsample_padding))

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Appends every intermediate result to ``skips``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding)
            if len(self.attentions):
                x = self.attentions[i](x)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, embedding)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them if asked for."""

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        scale = config.mid_block_scale_factor
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels, output_scale=scale) for _ in range(2))
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift == "default":
            groups = config.norm_num_groups
        self.attentions = nn.ModuleList()
        if config.add_attention:
            self.attentions.append(Attention(channels, config.attention_head_dim, groups, config.norm_eps, scale))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.resnets[0](x, embedding)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, embedding)


class UpBlock(nn.Module):
    """Residual blocks that take in one resolution's skips, last first, then the step to the next higher."""

    def __init__(
        self,
        config: UNet2DConfig,
        in_channels: int,
        skip_channels: int,
        out_channels: int,
        attention: bool,
        upsample: bool,
    ) -> None:
        """``skip_channels``: of the last skip, from the resolution above; the others have out_channels."""
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            skip = skip_channels if i == layers - 1 else out_channels
            self.resnets.append(ResnetBlock(config, (in_channels if i == 0 else out_channels) + skip, out_channels))
        self.attentions = _attentions(config, out_channels, layers if attention else 0)
        self.upsamplers = nn.ModuleList()
        if upsample and attention and config.upsample_type == "resnet":
            self.upsamplers.append(ResnetBlock(config, out_channels, out_channels, resample=double))
        elif upsample:
            self.upsamplers.append(Upsample(out_channels))

    def forward(self, x: Tensor, embedding: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes its inputs off the end of ``skips``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat((x, skips.pop()), dim=1), embedding)
            if len(self.attentions):
                x = self.attentions[i](x)
        for upsampler in self.upsamplers:
            x = upsampler(x, embedding)
        return x


def _attentions(config: UNet2DConfig, channels: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(
        Attention(channels, config.attention_head_dim, config.norm_num_groups, config.norm_eps) for _ in range(count)
    )
