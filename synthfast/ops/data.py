"""Batches from a data set in memory: the operations of ``csrc/data``."""

from __future__ import annotations

import torch
from torch import Tensor

from synthfast.ops.sampling import Stream, philox_uniform_


def gather_augment(
    images: Tensor, items: Tensor, index: Tensor, seed: int, *, padding: int = 0, flip: bool = False, dtype=torch.float32
) -> Tensor:
    n, h, w = len(items), images.shape[1], images.shape[2]
    u = philox_uniform_(torch.empty(n, 4, device=images.device), index, seed, Stream.AUGMENT)
    batch = torch.nn.functional.pad(images[items], (0, 0, padding, padding, padding, padding))
    top, left = (u[:, k] * (2 * padding + 1) for k in (0, 1))
    rows = top.long()[:, None] + torch.arange(h, device=images.device)
    columns = left.long()[:, None] + torch.arange(w, device=images.device)
    if flip:
        columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns)
    out = batch[torch.arange(n, device=images.device)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return (out.permute(0, 3, 1, 2).float() / 255).to(dtype)
