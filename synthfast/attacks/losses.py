"""Losses that attacks maximize: one number per image, float32 [N], from logits [N, K] of any float type.

The images' true classes ``y`` and targets are int64 [N] in [0, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """-log softmax(z)_y."""
    return torch.nn.functional.cross_entropy(logits.float(), y, reduction="none")


def ce_targeted(logits: Tensor, target: Tensor) -> Tensor:
    """log softmax(z)_t: grows as the image moves to the class ``target``."""
    return -cross_entropy(logits, target)


def cw_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y, positive where the image is misclassified (Carlini and Wagner 2017, f6 without the cut at 0)."""
    logits = logits.float()
    return best_other(logits, y) - pick(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{j != y} z_j) / (z_pi1 - z_pi3), pi the classes from the highest logit down.

    Unlike cross-entropy it does not change when logits are shifted or scaled (Croce and Hein 2020, eq. 6). Needs K >= 3.
    """
    logits = logits.float()
    top = logits.topk(3, dim=1).values
    return (best_other(logits, y) - pick(logits, y)) / (top[:, 0] - top[:, 2] + _TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2) (Croce and Hein 2020, eq. 7). Needs K >= 4."""
    logits = logits.float()
    top = logits.topk(4, dim=1).values
    return (pick(logits, target) - pick(logits, y)) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


def pick(logits: Tensor, classes: Tensor) -> Tensor:
    """z_c for each image's class c: [N]."""
    return logits.gather(1, classes[:, None])[:, 0]


def best_other(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j: [N]. Its gradient goes to one class, also where several have the same logit."""
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.max(dim=1).values


def other_classes(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The ``count`` <= K - 1 classes other than y with the highest logits, highest first: int64 [N, count]."""
    return logits.detach().float().scatter(1, y[:, None], float("-inf")).topk(count, dim=1).indices
