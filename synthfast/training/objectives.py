"""What a classifier is trained for: losses, and the images that adversarial training puts in place of the given ones.

Everywhere: images float32 [N, C, H, W] in [0, 1]; logits [N, K] of any float type; targets are classes int64 [N] or
probabilities float [N, K]. ``attacked`` maps images to logits: the network as an attack sees it, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from synthfast import ops
from synthfast.attacks.pgd import pgd_maximize

Network = Callable[[Tensor], Tensor]
_TRADES_START = 0.001


@dataclass(frozen=True)
class Ball:
    """The attack of adversarial training: ``steps`` steps of ``step_size`` in the ball of ``norm`` and radius ``eps``."""

    norm: str
    eps: float
    step_size: float
    steps: int


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean of -sum_k t_k log softmax(f(x))_k, with t = (1 - smoothing) target + smoothing / K (Szegedy et al. 2016)."""
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """KL(p || q) of p = softmax(logits) and q = softmax(other), for each image: float32 [N]."""
    log_p, log_q = logits.float().log_softmax(1), other.float().log_softmax(1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def trades_loss(clean: Tensor, adversarial: Tensor, targets: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """CE(f(x), y) + beta KL(f(x) || f(x')), the batch's mean, with beta = 1 / lambda (Zhang et al. 2019, eq. 5).

    Args:
        clean, adversarial: f(x) and f(x'). The gradient goes through both, as in the authors' training.
    """
    return cross_entropy(clean, targets, smoothing) + beta * kl_divergence(clean, adversarial).mean()


def pgd_images(
    attacked: Network, x: Tensor, targets: Tensor, index: Tensor, seed: int, ball: Ball, *, stage: int = 0
) -> Tensor:
    """argmax over x' in the ball of CE(f(x'), y), by projected gradient ascent from a uniform start (Madry et al. 2018, eq. 2.1).

    Args:
        index: int64 [N], what keys each image's start, with ``seed`` and ``stage``.
    """
    start = ops.ball_start(x, index, ball.eps, ball.norm, seed, stage)

    def loss(images: Tensor) -> Tensor:
        return F.cross_entropy(attacked(images).float(), targets, reduction="none")

    return _maximize(loss, start, x, ball)


def trades_images(attacked: Network, x: Tensor, index: Tensor, seed: int, ball: Ball) -> Tensor:
    """argmax over x' in the ball of KL(f(x) || f(x')), from x + 0.001 N(0, 1), where the gradient is not yet 0.

    The start is that of Zhang et al. 2019 in both norms (their experiments, section 5.2). ``index`` as in :func:`pgd_images`.
    """
    noise = ops.philox_normal_(torch.empty_like(x), index, seed, ops.Stream.ATTACK)
    start = (x + _TRADES_START * noise).clamp(0, 1)
    with torch.no_grad():
        clean = attacked(x).float()
    return _maximize(lambda images: kl_divergence(clean, attacked(images)), start, x, ball)


def _maximize(loss: Callable[[Tensor], Tensor], start: Tensor, x: Tensor, ball: Ball) -> Tensor:
    return pgd_maximize(loss, start, x, norm=ball.norm, eps=ball.eps, step_size=ball.step_size, steps=ball.steps)
