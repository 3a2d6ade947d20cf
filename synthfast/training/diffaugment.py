"""Differentiable augmentation of real and generated images (DiffAugment, Zhao et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from synthfast import ops

# https://arxiv.org/abs/2006.10738, section 4 and the authors' settings.
POLICIES = ("colour", "translation", "cutout")
_SHIFT = 0.125  # of the side, at most
_HOLE = 0.5  # of the side


def diff_augment(images: Tensor, index: Tensor, seed: int, policy: tuple[str, ...], step: int = 1) -> Tensor:
    """Augment images so that gradients pass.

    Args:
        images: float [N, C, H, W] in [-1, 1].
        index: int64 [N] on the same device: what keys the draws of each image, with ``seed`` and ``step``. Equal ones (of a
            real and a generated image) are augmented alike.
        policy: any of

            - "colour": brightness, saturation and contrast of RGB images,
            - "translation": by whole pixels, up to an eighth of the side, zeros (mid-grey) where nothing comes in,
            - "cutout": a square of half the side becomes zeros, cut at the border.
        step: within stream ``AUGMENT``; 0 is that of flips.

    Returns:
        Images like ``images``, channels_last.
    """
    n, channels, height, width = images.shape
    u = ops.philox_uniform_(torch.empty(n, 7, device=images.device), index, seed, ops.Stream.AUGMENT, step)
    images = images.contiguous(memory_format=torch.channels_last)
    if "colour" in policy and channels == 3:
        images = _colour(images, u[:, :3].to(images.dtype))
    x = images.permute(0, 2, 3, 1)
    keep = None
    if "translation" in policy:
        rows, inside_rows = _shifted(u[:, 3], height)
        columns, inside_columns = _shifted(u[:, 4], width)
        source = rows[:, :, None] * width + columns[:, None, :]
        x = x.reshape(n, height * width, channels)
        x = x.gather(1, source.view(n, -1, 1).expand(-1, -1, channels)).view(n, height, width, channels)
        keep = inside_rows[:, :, None] & inside_columns[:, None, :]
    if "cutout" in policy:
        hole = _hole(u[:, 5], height)[:, :, None] & _hole(u[:, 6], width)[:, None, :]
        keep = ~hole if keep is None else keep & ~hole
    if keep is not None:
        x = x * keep[..., None]
    return x.permute(0, 3, 1, 2)


def _colour(images: Tensor, u: Tensor) -> Tensor:
    brightness, saturation, contrast = u[:, :, None, None, None].unbind(1)
    x = images + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = torch.lerp(grey, x, 2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, contrast + 0.5)


def _shifted(u: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where each row (or column) comes from, int64 [N, size], and whether that is inside the image, bool [N, size]."""
    most = int(size * _SHIFT + 0.5)
    shift = (u * (2 * most + 1)).long() - most
    source = torch.arange(size, device=u.device) - shift[:, None]
    return source.clamp(0, size - 1), (source >= 0) & (source < size)


def _hole(u: Tensor, size: int) -> Tensor:
    """bool [N, size]: the rows (or columns) of a hole around a uniform centre."""
    side = int(size * _HOLE + 0.5)
    first = (u * (size + 1 - side % 2)).long() - side // 2
    pixel = torch.arange(size, device=u.device)
    return (pixel >= first[:, None]) & (pixel < first[:, None] + side)
