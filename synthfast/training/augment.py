"""CutMix: boxes of other images, with labels in proportion to what is seen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from synthfast import ops


def cutmix(
    images: Tensor, labels: Tensor, classes: int, index: Tensor, seed: int, probability: float
) -> tuple[Tensor, Tensor]:
    """Paste a box of another image of the batch into each image, with ``probability`` (Yun et al. 2019, section 3.1).

    Image i becomes M x_i + (1 - M) x_j with target lambda y_i + (1 - lambda) y_j. The box has sides W sqrt(1 - u) and
    H sqrt(1 - u) with u uniform in [0, 1) (their Beta(1, 1)) around a uniform centre, cut at the border; lambda is the share
    of x_i that is left. Box and partner j != i are drawn for each image, not once a batch: the distribution of a mixed image
    is the same, the gradient of a step varies less.

    Args:
        images: float [N, C, H, W], N >= 2, the whole batch.
        labels: int64 [N].
        index: int64 [N], what keys the draws of each image, with ``seed``.

    Returns:
        (mixed images like ``images``, targets float32 [N, classes] that sum to 1)
    """
    n, _, height, width = images.shape
    u = ops.philox_uniform_(torch.empty(n, 5, device=images.device), index, seed, ops.Stream.CUTMIX)
    side = (1 - u[:, 1]).sqrt() * (u[:, 0] < probability)  # 0: an empty box
    rows = _inside(u[:, 2], side, height)
    columns = _inside(u[:, 3], side, width)
    box = rows[:, :, None] & columns[:, None, :]
    partner = (torch.arange(n, device=images.device) + 1 + (u[:, 4] * (n - 1)).long()) % n
    mixed = torch.where(box[:, None], images[partner], images)
    pasted = box.float().mean((1, 2))[:, None]
    targets = F.one_hot(labels, classes).float()
    return mixed, targets + pasted * (targets[partner] - targets)


def _inside(centre: Tensor, side: Tensor, size: int) -> Tensor:
    """bool [N, size]: pixels between (centre - side / 2) and (centre + side / 2), both in units of the image's size."""
    first = ((centre - side / 2) * size).floor().clamp(min=0)
    last = ((centre + side / 2) * size).floor().clamp(max=size)
    pixel = torch.arange(size, device=centre.device)
    return (pixel >= first[:, None]) & (pixel < last[:, None])
