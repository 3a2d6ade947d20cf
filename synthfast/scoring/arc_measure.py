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

_CONVERGED = 0.002  # share of the images; a run that breaks no more is the last one
_MOST_RUNS = 3  # times the restarts


class MarginAPGD(APGD):
    """Auto-PGD on the margin between the logits, z_other - z_y.

    With two classes it grows as the cross-entropy does, and its gradient does not vanish where the network is sure.
    """

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        return cw_margin(logits, y)


@dataclass(frozen=True)
class MeasureSettings:
    """steps, restarts: of :class:`MarginAPGD`, see :func:`measure`; batch_size: images attacked together."""

    steps: int = 25
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
    attack has converged: what the last run still breaks says how much a further one might. As long as that is more than 0.2% of
    the images there are further runs, up to three times ``restarts``; with one restart there is one run.

    Args:
        attacked: a discriminator as attacks see it.
        real, synthetic: uint8 [n, H, W, C] on its device.
        eps: radius on pixels in [0, 1].
        stopped: called between batches; it may raise to end the work.

    Returns:
        :class:`Outcomes`, which do not depend on the batch size beyond rounding: starts are keyed by an image's number.
    """
    images = (real, synthetic)
    pixels, device = torch.cat(images), real.device
    y = torch.cat([torch.full((len(part),), kind) for part, kind in zip(images, (REAL, SYNTHETIC), strict=True)])
    y = y.to(device)
    counts = torch.zeros(len(pixels), dtype=torch.uint8, device=device)  # runs stood, and one for being right as it is

    def stand(rows: Tensor, attack: MarginAPGD | None) -> Tensor:
        """The rows that are right, after the attack if there is one."""
        left = []
        for part in rows.split(settings.batch_size):
            if stopped is not None:
                stopped()
            x = to_unit(pixels[part], device)
            if attack is None:
                with torch.inference_mode():
                    left.append(part[attacked(x).argmax(1) == y[part]])
            else:
                left.append(part[~attack.run(attacked, x, y[part], part).fooled])
        return torch.cat(left)

    standing = stand(torch.arange(len(pixels), device=device), None)
    counts[standing] = 1
    runs, most = 0, 1 if settings.restarts == 1 else _MOST_RUNS * settings.restarts
    while eps > 0 and runs < most and len(standing) > 0:
        before = len(standing)
        standing = stand(standing, MarginAPGD(norm, eps, steps=settings.steps, seed=_seed(settings.seed, runs)))
        counts[standing] += 1
        runs += 1
        if runs >= settings.restarts and before - len(standing) <= _CONVERGED * len(pixels):
            break
    if eps > 0:  # where nothing stands, no run would change that
        runs = max(runs, settings.restarts)
    stood = counts.cpu().numpy()
    return Outcomes(stood[: len(real)], stood[len(real) :], runs)


def _seed(seed: int, run: int) -> int:
    """Another seed for each run, in [-2^63, 2^63)."""
    return (seed + 2**63 + run * 0x9E3779B97F4A7C15 + 1) % 2**64 - 2**63
