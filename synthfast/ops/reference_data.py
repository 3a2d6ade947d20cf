"""Plain PyTorch versions of the operations of ``csrc/data``; see ``reference.py``. They are equal to the kernels bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from synthfast.ops.reference import philox_bits

_AUGMENT = 5  # synthfast.ops.Stream.AUGMENT


def draw_crops(index: Tensor, seed: int, padding: int, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """First row and first column of each sample's crop in the padded image, int64 [N] in [0, 2 padding], and whether it is
    mirrored, bool [N]."""
    words = philox_bits(3, index, seed, _AUGMENT)
    top, left = ((words[:, k] >> 8) * (2 * padding + 1) >> 24 for k in (0, 1))
    return top, left, (words[:, 2] < 2**31) & flip


def gather_augment(
    images: Tensor,
    items: Tensor,
    index: Tensor,
    seed: int,
    *,
    padding: int = 0,
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """See :func:`synthfast.ops.gather_augment`."""
    _, h, w, _ = images.shape
    top, left, mirrored = draw_crops(index, seed, padding, flip)
    x = torch.arange(w, device=images.device).expand(len(items), w)
    x = torch.where(mirrored[:, None], w - 1 - x, x) + left[:, None] - padding
    y = torch.arange(h, device=images.device) + top[:, None] - padding
    inside = ((y >= 0) & (y < h))[:, :, None] & ((x >= 0) & (x < w))[:, None, :]
    pixels = images[items[:, None, None], y.clamp(0, h - 1)[:, :, None], x.clamp(0, w - 1)[:, None, :]]
    pixels = torch.where(inside[..., None], pixels, 0).float()
    # By a tensor: PyTorch's division by a number is a product with its reciprocal on CUDA.
    return (pixels / pixels.new_full((1,), 255.0)).permute(0, 3, 1, 2).to(dtype)
