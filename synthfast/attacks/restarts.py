"""Attacks made of runs: one from each random start, or toward each of several target classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from synthfast import ops
from synthfast.attacks.base import ActiveSet, Attack, Model
from synthfast.attacks.losses import other_classes
from synthfast.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class RestartedAttack(Attack):
    """An attack that runs ``restarts`` times, for each target if it has targets, every run on the images still standing.

    A run starts at a uniform point of the ball, drawn by (seed, index, number of the run).
    """

    restarts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts < 1:
            raise UsageError(f"restarts must be 1 or more, found {self.restarts}")

    def _attack(self, model: Model, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        active = ActiveSet(x, y, index)
        targets = self._targets(model, x, y)
        for run in range(self.restarts * (1 if targets is None else targets.shape[1])):

            def loss(logits: Tensor, run: int = run) -> Tensor:
                target = None if targets is None else targets[active.rows, run // self.restarts]
                return self._loss(logits, active.y, target)

            images, losses = self._one_run(model, active, loss, self._start(active, run))
            if not active:
                break
            active.keep(images, losses)
        return active.found

    def _start(self, active: ActiveSet, run: int) -> Tensor:
        return ops.ball_start(active.origin, active.index, self.radius, self.norm, self.seed, run)

    def _targets(self, model: Model, x: Tensor, y: Tensor) -> Tensor | None:
        """int64 [N, T]: the classes to attack toward, in turn; None for an attack without targets."""
        count = self._target_count
        if count == 0:
            return None
        logits = model(x)
        return other_classes(logits, y, min(count, logits.shape[1] - 1))

    @property
    @abstractmethod
    def _target_count(self) -> int:
        """Number of targets, or more than there are classes for all others; 0 for an attack without targets."""

    @abstractmethod
    def _loss(self, logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
        """What a run maximizes: float32 [n]."""

    @abstractmethod
    def _one_run(
        self, model: Model, active: ActiveSet, loss: Callable[[Tensor], Tensor], start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attack the images of ``active`` from ``start``, retiring what breaks: strongest images and their losses, of the rest.

        ``loss``: from logits of the images that stand at the moment of the call. ``start`` may be overwritten.
        """
