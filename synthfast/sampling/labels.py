"""Which class each image of a run gets: a function of the image's index and the seed alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from synthfast import ops
from synthfast.errors import UsageError


@dataclass(frozen=True)
class LabelPlan:
    """How labels are given out.

    cycle: image i has class cycle[i mod len(cycle)]; or, where it is empty,
    weights: classes are drawn in proportion to these, independently, from stream ``LABEL``.
    """

    cycle: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str, classes: int) -> LabelPlan:
        """From the words of ``--labels``: balanced, uniform, classes such as ``3`` or ``3,5``, or ``weights:0.5,0.3,...``.

        Raises UsageError for anything else, a class outside [0, classes), or weights that are not ``classes``
        non-negative numbers with a positive sum.
        """
        if text == "balanced":
            return cls(cycle=tuple(range(classes)))
        if text == "uniform":
            return cls(weights=(1.0,) * classes)
        if text.startswith("weights:"):
            try:
                weights = tuple(float(part) for part in text.removeprefix("weights:").split(","))
            except ValueError:
                weights = ()
            total = sum(weights)
            if len(weights) != classes or min(weights) < 0 or not 0 < total < float("inf"):
                raise UsageError(f"--labels {text}: expected {classes} non-negative numbers, not all 0, one a class")
            return cls(weights=weights)
        try:
            cycle = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise UsageError(
                f"--labels {text}: expected balanced, uniform, classes such as 3 or 3,5, or weights:..."
            ) from None
        if not all(0 <= label < classes for label in cycle):
            raise UsageError(f"--labels {text}: expected classes from 0 to {classes - 1}")
        return cls(cycle=cycle)

    def labels(self, index: Tensor, seed: int) -> Tensor:
        """Labels int64 [N] of the images ``index`` int64 [N]."""
        if self.cycle:
            return torch.tensor(self.cycle, device=index.device)[index % len(self.cycle)]
        uniform = ops.philox_uniform_(torch.empty(len(index), 1, device=index.device), index, seed, ops.Stream.LABEL)
        bounds = torch.tensor(self.weights, dtype=torch.float64).cumsum(0)
        bounds = (bounds / bounds[-1])[:-1].to(index.device)
        return torch.searchsorted(bounds, uniform[:, 0].double(), right=True)
