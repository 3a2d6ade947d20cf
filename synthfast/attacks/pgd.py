"""Projected gradient descent (Madry et al. 2018, arXiv:1706.06083)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synthfast.attacks import losses
from synthfast.attacks.base import (
    NORMS,
    ActiveSet,
    Model,
    float32_below,
    forward_gradient,
    input_gradient,
    misclassified,
    per_image,
    step_,
)
from synthfast.attacks.restarts import RestartedAttack
from synthfast.errors import UsageError

LOSSES = ("ce", "cw", "targeted")


@dataclass(frozen=True, kw_only=True)
class PGD(RestartedAttack):
    """Steps of one size up the gradient, each followed by a projection.

    steps: number of steps of a run.
    step_size: their size on pixels in [0, 1]; None for 2.5 eps / steps (Madry et al.), so that every point can be reached.
    loss: "ce", cross-entropy; "cw", the margin of Carlini and Wagner; or "targeted", which minimizes the cross-entropy to each
        other class in turn, from the highest logit down.
    targets: with "targeted", how many classes; None for all others.
    random_start: start at a uniform point of the ball, else at the image itself.
    stop_early: judge every iterate, so that an image leaves once it is broken. Otherwise the last iterates alone are judged.
    """

    steps: int = 20
    step_size: float | None = None
    loss: str = "ce"
    targets: int | None = None
    random_start: bool = True
    stop_early: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UsageError(f"steps must be 1 or more, found {self.steps}")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise UsageError(f"step_size must be a finite number > 0 on pixels in [0, 1], found {self.step_size}")
        if self.loss not in LOSSES:
            raise UsageError(f"loss must be one of {', '.join(LOSSES)}, found {self.loss!r}")
        if self.targets is not None and (self.loss != "targeted" or self.targets < 1):
            raise UsageError(f"targets must be 1 or more, with loss targeted, found {self.targets} with {self.loss}")
        if self.restarts > 1 and not self.random_start:
            raise UsageError("restarts without random_start would all be the same; set restarts=1 or random_start=True")

    @property
    def _target_count(self) -> int:
        if self.loss != "targeted":
            return 0
        return sys.maxsize if self.targets is None else self.targets

    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        if target is not None:
            return losses.ce_targeted(logits, target)
        return (losses.cross_entropy if self.loss == "ce" else losses.cw_margin)(logits, y)

    def _start(self, active: ActiveSet, run: int) -> Tensor:
        return super()._start(active, run) if self.random_start else active.origin.clone()

    def _one_run(
        self, model: Model, active: ActiveSet, loss: Callable[[Tensor], Tensor], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = start
        step_size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        for _ in range(self.steps):
            logits, values, gradient = forward_gradient(model, x, loss)
            if self.stop_early:
                x, values, gradient = active.retire(misclassified(logits, active.y), x, x, values, gradient)
                if not active:
                    return x, values
            eps, size = per_image(self.radius, x), per_image(step_size, x)
            x = step_(x, gradient, active.origin, eps, size, self.norm)
        logits = model(x).float()
        return active.retire(misclassified(logits, active.y), x, x, loss(logits))


@torch.no_grad()
def pgd_maximize(
    loss_of: Callable[[Tensor], Tensor],
    start: Tensor,
    origin: Tensor,
    *,
    norm: str,
    eps: Tensor | float,
    step_size: Tensor | float,
    steps: int,
) -> Tensor:
    """The bare loop of PGD, for training: no image leaves, nothing is judged, the host never waits for the device.

    Args:
        loss_of: from images like ``start`` to losses [N], which are maximized.
        start, origin: images [N, ...] in [0, 1]; they are not changed.
        norm: "linf" or "l2".
        eps, step_size: on pixels in [0, 1], numbers or float32 [N] on the device of the images.
        steps: number of steps; 0 returns a copy of ``start``.

    Returns:
        The last iterates: in the ball around ``origin`` and in [0, 1], like ``start``, without a graph.
    """
    if norm not in NORMS:
        raise UsageError(f"norm must be linf or l2, found {norm!r}")
    eps = per_image(eps if isinstance(eps, Tensor) else float32_below(eps), start)
    step_size = per_image(step_size, start)
    origin, x = origin.detach(), start.detach().clone()
    for _ in range(steps):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = input_gradient(loss_of(leaf), leaf)
        x = step_(x, gradient, origin, eps, step_size, norm)
    return x
