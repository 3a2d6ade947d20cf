"""Batches from a data set in memory: the operations of ``csrc/data``."""

from __future__ import annotations

import torch
from torch import Tensor

import synthfast.ops._extension  # noqa: F401  (registers torch.ops.synthfast)


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
    """A training batch from a set of images, in one pass: gathered, cropped, mirrored, scaled to [0, 1].

    Each image is padded by ``padding`` zero pixels on all sides, an H x W part of it is cut out at a random place, and that is
    mirrored with probability 1/2 (He et al. 2016, "Deep residual learning for image recognition", section 4.2).

    Args:
        images: uint8 [M, H, W, C], contiguous, H W C <= 2^30. It may be memory-mapped and of any size; it is never copied.
        items: int64 [N] on the device of ``images``, in [0, M): which images. Others are an error on the CPU; on CUDA, where
            it could not be reported without waiting for the GPU, its sample becomes NaN.
        index: int64 [N] on the same device: keys of the randomness, such as the samples' positions in the run.
        seed: key of the run, in [-2^63, 2^63).
        padding: in [0, 2^23). With 0 nothing is cropped.
        flip: whether to mirror.
        dtype: float32, bfloat16 or float16.

    Returns:
        [N, C, H, W] in ``dtype``, channels_last: byte / 255, correctly rounded to float32, then to ``dtype``.

    Crop and flip depend on (seed, index) alone. They come from words 0, 1 and 2 of the sample's first Philox block in
    ``Stream.AUGMENT``: the crop starts at row ``(word0 >> 8) * (2 padding + 1) >> 24`` of the padded image, at a column made of
    word 1 in the same way, and is mirrored where word 2 is below 2^31. The same bits on CPU and CUDA.

    Raises:
        RuntimeError: for arguments of another kind than described, and for items outside the set (CPU).
    """
    return torch.ops.synthfast.gather_augment(images, items, index, seed, padding, flip, dtype)


@torch.library.register_fake("synthfast::gather_augment")
def _(images: Tensor, items: Tensor, index: Tensor, seed: int, padding: int, flip: bool, dtype: torch.dtype) -> Tensor:
    return images.new_empty((items.shape[0], *images.shape[1:]), dtype=dtype).permute(0, 3, 1, 2)
