"""Robust success of a discriminator on held-out images, under an attack stronger than the one it was trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synthfast.attacks import APGD
from synthfast.attacks.losses import cw_margin
from synthfast.models.frozen import Frozen
from synthfast.scoring.discriminator import REAL, SYNTHETIC
from synthfast.training.batches import to_unit


class MarginAPGD(APGD):
    """Auto-PGD on the margin between the logits, z_other - z_y.

    With two classes it grows as the cross-entropy does, and its gradient does not vanish where the network is sure.
    """

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        return cw_margin(logits, y)


@dataclass(frozen=True)
class MeasureSettings:
    """steps, restarts: of :class:`MarginAPGD`; batch_size: images attacked together."""

    steps: int = 50
    restarts: int = 2
    batch_size: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Outcomes:
    """real, synthetic: uint8 [images], the number of runs of the attack that an image stood, 0 if it is misclassified as it is.

    runs: how many there were; an image with ``runs + 1`` was right and is unbroken.
    """

    real: np.ndarray
    synthetic: np.ndarray
    runs: int

    def right(self, runs: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """bool [images] of both kinds: right and unbroken after so many runs, by default all."""
        needed = (self.runs if runs is None else runs) + 1
        return self.real >= needed, self.synthetic >= needed

    def success(self, runs: int | None = None) -> float:
        """Mean of the shares of both kinds."""
        real, synthetic = self.right(runs)
        return float(real.mean() + synthetic.mean()) / 2


def measure(
    attacked: Frozen,
    real: Tensor,
    synthetic: Tensor,
    eps: float,
    norm: str,
    settings: MeasureSettings,
    stopped: Callable[[], None] | None = None,
) -> Outcomes:
    """Attack the held-out images of both kinds.

    Each restart is a run of its own, from another start, on the images that still stand, so that it can be seen whether the
    attack has converged: what the last run still breaks says how much a further one might.

    Args:
        attacked: a discriminator as attacks see it.
        real, synthetic: uint8 [n, H, W, C] on its device.
        eps: radius on pixels in [0, 1].
        stopped: called between batches; it may raise to end the work.

    Returns:
        :class:`Outcomes`, which do not depend on the batch size beyond rounding: starts are keyed by an image's number.
    """
    runs = settings.restarts if eps > 0 else 0
    stood = []
    for kind, images, first_number in ((REAL, real, 0), (SYNTHETIC, synthetic, len(real))):
        counts = torch.zeros(len(images), dtype=torch.uint8, device=images.device)
        for first in range(0, len(images), settings.batch_size):
            if stopped is not None:
                stopped()
            x = to_unit(images[first : first + settings.batch_size], images.device)
            y = torch.full((len(x),), kind, device=x.device)
            index = torch.arange(first, first + len(x), device=x.device) + first_number
            counts[first : first + len(x)] = _runs_stood(attacked, x, y, index, eps, norm, runs, settings)
        stood.append(counts.cpu().numpy())
    return Outcomes(stood[0], stood[1], runs)


def _runs_stood(
    attacked: Frozen,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    eps: float,
    norm: str,
    runs: int,
    settings: MeasureSettings,
) -> Tensor:
    with torch.inference_mode():
        standing = (attacked(x).argmax(1) == y).nonzero()[:, 0]
    counts = torch.zeros(len(x), dtype=torch.uint8, device=x.device)
    counts[standing] = 1
    for run in range(runs):
        if len(standing) == 0:
            break
        attack = MarginAPGD(norm, eps, steps=settings.steps, seed=_seed(settings.seed, run))
        left = x[standing].contiguous(memory_format=torch.channels_last)
        fooled = attack.run(attacked, left, y[standing], index[standing]).fooled
        standing = standing[~fooled]
        counts[standing] += 1
    return counts


def _seed(seed: int, run: int) -> int:
    """Another seed for each run, in [-2^63, 2^63)."""
    return (seed + 2**63 + run * 0x9E3779B97F4A7C15 + 1) % 2**64 - 2**63
