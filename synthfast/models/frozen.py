"""A network as attacks see it: evaluation mode, no gradients for the weights."""

from __future__ import annotations

import copy

from torch import Tensor, nn


class Frozen:
    def __init__(self, model: nn.Module) -> None:
        self._model, self._copy = model, None
        self.refresh()

    def refresh(self) -> None:
        self._copy = copy.deepcopy(self._model).eval().requires_grad_(False)

    def __call__(self, x: Tensor) -> Tensor:
        return self._copy(x)


def freeze(model: nn.Module) -> Frozen:
    return Frozen(model)
