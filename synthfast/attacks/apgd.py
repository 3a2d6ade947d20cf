"""Auto-PGD (Croce and Hein 2020, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", arXiv:2003.01690, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from synthfast import ops
from synthfast.attacks import losses
from synthfast.attacks.base import ActiveSet, Model, forward_gradient, misclassified, per_image, select
from synthfast.attacks.restarts import RestartedAttack
from synthfast.errors import UsageError

_RHO = 0.75  # the share of steps that must raise the loss for the step size to stay
_MOMENTUM = 0.75  # alpha of the paper


@dataclass(frozen=True, kw_only=True)
class APGD(RestartedAttack):
    """Gradient steps with momentum, whose size is halved for each image by its own progress; nothing to tune.

    loss: "ce", cross-entropy, or "dlr", difference of logits ratio, which needs 3 classes (4 with targets).
    targets: 0 for an untargeted attack; else how many other classes are attacked in turn, from the highest logit down (APGD-T
        of the paper: loss "dlr" and 9 targets). With fewer other classes, all of them.
    steps: number of steps of a run.

    The start is uniform in the ball, as algorithm 1 has it for every norm. (The authors' program scales its starts to the
    sphere; in l2 nearly all of a ball's volume is there anyway, and the results agree, see tests/attacks/test_apgd.py.)
    """

    steps: int = 100
    loss: str = "ce"
    targets: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UsageError(f"steps must be 1 or more, found {self.steps}")
        if self.loss not in ("ce", "dlr"):
            raise UsageError(f"loss must be ce or dlr, found {self.loss!r}")
        if self.targets < 0:
            raise UsageError(f"targets must be 0 for an untargeted attack, or more, found {self.targets}")

    @property
    def classes_needed(self) -> int:
        return 2 if self.loss == "ce" else 4 if self.targets else 3

    @property
    def _target_count(self) -> int:
        return self.targets

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return (losses.cross_entropy if self.loss == "ce" else losses.dlr)(logits, y)
        return losses.ce_targeted(logits, target) if self.loss == "ce" else losses.dlr_targeted(logits, y, target)

    def _one_run(
        self, model: Model, active: ActiveSet, loss: Callable[[Tensor], Tensor], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        lengths = {after: after - before for before, after in pairwise(checkpoints(self.steps))}
        logits, value, gradient = forward_gradient(model, start, loss)
        path = _Path(
            x=start,
            previous=start.clone(),
            gradient=gradient,
            loss=value,
            best=start.clone(),
            best_gradient=gradient,
            best_loss=value,
            step_size=per_image(2 * self.radius, start),
            rises=torch.zeros_like(value),
            checked_loss=value,
            halved=torch.zeros_like(value, dtype=torch.bool),
        )
        path = _Path(*active.retire(misclassified(logits, active.y), path.x, *path))
        for k in range(1, self.steps + 1):
            if not active:
                break
            x = ops.apgd_step_(
                path.previous,
                path.x,
                path.gradient,
                active.origin,
                per_image(self.radius, path.x),
                path.step_size,
                per_image(1.0 if k == 1 else _MOMENTUM, path.x),
                self.norm,
            )
            if k < self.steps:
                logits, value, gradient = forward_gradient(model, x, loss)
            else:  # no step follows, so the gradient is not needed
                logits = model(x).float()
                value = loss(logits)
            path = path.advanced(x, value, gradient if k < self.steps else path.gradient)
            # Before a checkpoint, which may put the best iterate in the place of the one that these logits are of.
            path = _Path(*active.retire(misclassified(logits, active.y), path.x, *path))
            if k in lengths and k < self.steps:
                path = path.checked(lengths[k])
        return path.best, path.best_loss


def checkpoints(steps: int) -> list[int]:
    """Steps after which the step size may be halved, 0 in front: ceil(p_j steps), with p_0 = 0, p_1 = 0.22 and
    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06) (section 3.2 of the paper), counted in hundredths to be exact."""
    before, p, found = 0, 22, [0]
    while p <= 100:
        at = -(-p * steps // 100)
        if at > found[-1]:
            found.append(at)
        before, p = p, p + max(p - before - 3, 6)
    return found


class _Path(NamedTuple):
    """The state of a run, each [n, ...] for the images that still stand."""

    x: Tensor
    previous: Tensor  # the iterate before x; its memory takes the next one
    gradient: Tensor
    loss: Tensor
    best: Tensor  # the iterate with the highest loss
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor  # steps since the last checkpoint that raised the loss
    checked_loss: Tensor  # best_loss at the last checkpoint
    halved: Tensor  # the last checkpoint halved the step size

    def advanced(self, x: Tensor, loss: Tensor, gradient: Tensor) -> _Path:
        """After a step to ``x``."""
        better = loss > self.best_loss
        return self._replace(
            x=x,
            previous=self.x,
            gradient=gradient,
            loss=loss,
            best=select(better, x, self.best),
            best_gradient=select(better, gradient, self.best_gradient),
            best_loss=torch.where(better, loss, self.best_loss),
            rises=self.rises + (loss > self.loss),
        )

    def checked(self, length: int) -> _Path:
        """After a checkpoint, ``length`` steps after the last one: halve the step size and go back to the best iterate where

        1. at most a share rho of the steps raised the loss (the paper says "less than", the authors' program this), or
        2. the last checkpoint did not halve it and the best loss has not grown since.
        """
        halve = (self.rises <= _RHO * length) | (~self.halved & (self.best_loss <= self.checked_loss))
        return self._replace(
            x=select(halve, self.best, self.x),
            gradient=select(halve, self.best_gradient, self.gradient),
            step_size=torch.where(halve, self.step_size / 2, self.step_size),
            rises=torch.zeros_like(self.rises),
            checked_loss=self.best_loss,
            halved=halve,
        )
